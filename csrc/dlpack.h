// The part of the DLPack 1.x ABI that fastlm reads: field order and meaning as in the public
// specification (dmlc/dlpack). Declared here so that a build needs no framework's headers.
#pragma once

#include <cstdint>

namespace fastlm::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means contiguous before DLPack 1.2
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};

// What `type(x).__dlpack_c_exchange_api__` points at, in a capsule named "dlpack_exchange_api".
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocator;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_of_object)(void* object, Tensor* out);  // borrowed: valid while the object exists
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace fastlm::dlpack
