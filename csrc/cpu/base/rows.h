// Rows of a tensor (..., width): contiguous with any number of dimensions, or a matrix with any row
// stride.
struct Rows {
  int64_t count, width, stride;
};
inline Rows rows_of(const char* argument, const TensorView& t) {
  if (t.ndim() == 2) return {t.size(0), t.size(1), t.stride(0)};
  check_contiguous(argument, t);
  int64_t count = 1;
  for (int i = 0; i < t.ndim() - 1; ++i) count *= t.size(i);
  return {count, t.size(-1), t.size(-1)};
}

// Calls f(pointer to the weight); the pointer is to float or T, and null without a weight.
template <class T, class F>
void with_weight(const TensorView* weight, F&& f) {
  if (!weight)
    f(static_cast<const T*>(nullptr));
  else if (weight->dtype() == DType::f32)
    f(static_cast<const float*>(weight->data<float>("weight")));
  else
    f(static_cast<const T*>(weight->data<T>("weight")));
}
