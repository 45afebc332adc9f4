#include <initializer_list>
#include <new>
#include <utility>

#include "cpu/decode/decode_plan.h"
#include "cpu/base/phases.h"

#define FASTLM_BODY "cpu/decode/decode_step.h"
#define FASTLM_INT8_BODY
#include "cpu/base/each_isa.h"

namespace fastlm {
namespace {

const float* floats(const char* argument, const OptionalTensor& t, int64_t size) {
  if (!t) return nullptr;
  check_contiguous(argument, *t);
  check_size(argument, "elements:", size, t->numel());
  return t->data<float>(argument);
}

}  // namespace

DecodeLinear::DecodeLinear(TensorView w, OptionalTensor scales, OptionalTensor b, int bits,
                           int64_t k, int64_t group_size, int act_bits)
    : bits(bits), int8_activations(act_bits == 8), n(w.size(0)), k(k) {
  check_contiguous("weight", w);
  if (bits == 16) {
    check_size("weight", "columns:", k, w.size(1));
    dtype = w.dtype();
    with_float(dtype, "weight", [&](auto tag) {
      weight = reinterpret_cast<const char*>(w.data<decltype(tag)>("weight"));
      row_bytes = k * int64_t(sizeof tag);
    });
  } else {
    row_bytes = bits == 8 ? k : (k + 1) / 2;
    check_size("weight", "bytes a row:", row_bytes, w.size(1));
    weight = bits == 8 ? reinterpret_cast<const char*>(w.data<int8_t>("weight"))
                       : reinterpret_cast<const char*>(w.data<uint8_t>("weight"));
    this->group_size = std::min(group_size, k);
    groups = (k + this->group_size - 1) / this->group_size;
    if (!scales) throw std::invalid_argument("table: expected the scales of a quantized weight");
    check_contiguous("table", *scales);
    check_size("table", "blocks of 16 rows:", (n + DECODE_TILE - 1) / DECODE_TILE, scales->size(0));
    check_size("table", "groups:", groups, scales->size(1));
    check_size("table", "rows of a block:", DECODE_TILE, scales->size(3));
    offsets = scales->size(2) == 2;
    dtype = scales->dtype();
    with_float(dtype, "table", [&](auto tag) {
      table = reinterpret_cast<const char*>(scales->data<decltype(tag)>("table"));
    });
  }
  bias = floats("bias", b, n);
}

void DecodeLinear::pack(TensorView out) {
  if (bits == 16) throw std::invalid_argument("weight: expected a quantized one, got a dense one");
  check_contiguous("tiles", out);
  check_size("tiles", "bytes:", tile_bytes(), out.numel());
  prefer_huge_pages(out);
  FASTLM_RUN(pack_tiles, *this, out.data<uint8_t>("tiles"));
}

DecodePlan::DecodePlan(const DecodeLinear& embedding, const DecodeLinear& head, TensorView norm,
                       int64_t heads, int64_t kv_heads, int64_t head_dim, const std::string& act,
                       float eps, float scale, float softcap, float embedding_scale,
                       float logit_softcap)
    : hidden(embedding.k),
      heads(heads),
      kv_heads(kv_heads),
      head_dim(head_dim),
      inner(0),
      eps(eps),
      scale(scale),
      softcap(softcap),
      embedding_scale(embedding_scale),
      logit_softcap(logit_softcap),
      act(act),
      embedding(embedding),
      head(head),
      norm(floats("norm", norm, embedding.k)) {}

void DecodePlan::add_layer(const std::vector<OptionalTensor>& norms,
                           const std::vector<DecodeLinear>& qkv, const DecodeLinear& out,
                           const DecodeLinear& gate, const DecodeLinear& up,
                           const DecodeLinear& down, OptionalTensor q_norm, OptionalTensor k_norm,
                           int64_t window, int rotary) {
  DecodeLayer layer;
  check_size("norms", "entries:", 4, int64_t(norms.size()));
  for (int i = 0; i < 4; ++i) layer.norms[i] = floats("norms", norms[size_t(i)], hidden);
  int64_t width = 0;
  for (const DecodeLinear& part : qkv) {
    check_size("qkv", "columns:", hidden, part.k);
    width += part.n;
  }
  check_size("qkv", "rows:", (heads + 2 * kv_heads) * head_dim, width);
  check_size("out", "columns:", heads * head_dim, out.k);
  check_size("gate", "columns:", hidden, gate.k);
  check_size("up", "columns:", hidden, up.k);
  check_size("up", "rows:", gate.n, up.n);
  check_size("down", "columns:", gate.n, down.k);
  for (const DecodeLinear* back : {&out, &down}) check_size("out, down", "rows:", hidden, back->n);
  layer.qkv = qkv, layer.out = out, layer.gate = gate, layer.up = up, layer.down = down;
  layer.norm_all_heads = q_norm && q_norm->numel() != head_dim;
  const int64_t q_size = layer.norm_all_heads ? heads * head_dim : head_dim;
  const int64_t k_size = layer.norm_all_heads ? kv_heads * head_dim : head_dim;
  layer.q_norm = floats("q_norm", q_norm, q_size);
  layer.k_norm = floats("k_norm", k_norm, k_size);
  layer.window = window, layer.rotary = rotary;
  inner = std::max(inner, gate.n);
  layers.push_back(layer);
}

int64_t DecodePlan::workspace_bytes(int64_t rows, int64_t longest) const {
  FASTLM_RUN(decode_workspace, *this, rows, longest, omp_get_max_threads());
  return 0;  // not reached
}

void decode_step(const DecodePlan& plan, TensorView tokens, TensorView lengths, TensorView table,
                 TensorView cache, OptionalTensor scales, const std::vector<TensorView>& rotary,
                 TensorView workspace, TensorView logits_indices, TensorView logits) {
  FASTLM_RUN(decode_step, plan, tokens, lengths, table, cache, scales, rotary, workspace,
             logits_indices, logits);
}

}  // namespace fastlm

FASTLM_MODULE(m) {
  using namespace fastlm;
  using namespace pybind11::literals;
  pybind11::class_<DecodeLinear>(m, "DecodeLinear")
      .def(pybind11::init<TensorView, OptionalTensor, OptionalTensor, int, int64_t, int64_t, int>(),
           "weight"_a, "table"_a, "bias"_a, "bits"_a, "k"_a, "group_size"_a, "act_bits"_a)
      .def_property_readonly("tile_bytes", &DecodeLinear::tile_bytes)
      .def("pack", &DecodeLinear::pack, "tiles"_a);
  pybind11::class_<DecodePlan>(m, "DecodePlan")
      .def(pybind11::init<const DecodeLinear&, const DecodeLinear&, TensorView, int64_t, int64_t,
                          int64_t, const std::string&, float, float, float, float, float>(),
           "embedding"_a, "head"_a, "norm"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "act"_a,
           "eps"_a, "scale"_a, "softcap"_a, "embedding_scale"_a, "logit_softcap"_a)
      .def("add_layer", &DecodePlan::add_layer, "norms"_a, "qkv"_a, "out"_a, "gate"_a, "up"_a,
           "down"_a, "q_norm"_a, "k_norm"_a, "window"_a, "rotary"_a)
      .def("workspace_bytes", &DecodePlan::workspace_bytes, "rows"_a, "longest"_a);
}
FASTLM_BIND(decode_step,
            "plan tokens lengths table cache scales rotary workspace logits_indices logits")
