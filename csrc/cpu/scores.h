// Scores z = softcap(scale * logit), and the running (maximum, sum of exponentials) of a softmax,
// for both cross-entropies.
//
// Infinities and NaN give the same results as in torch: z - max is NaN where both are infinite, and
// a NaN reaches the sum.
struct ScoreFunction {
  float scale, cap;  // cap 0: none

  FASTLM_INLINE vfloat operator()(vfloat x) const {
    x *= scale;
    return cap ? vtanh(x / cap) * cap : x;
  }
  // d z / d (scale * logit), from z
  FASTLM_INLINE vfloat slope(vfloat z) const {
    const vfloat t = z / cap;
    return 1.f - t * t;
  }
  FASTLM_INLINE float operator()(float x) const { return (*this)(splat(x))[0]; }
};

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Replaces the maximum of scores that are all -inf by a finite number: e^(-inf - 0) = 0, where
// -inf - -inf would be NaN.
FASTLM_INLINE float finite_max(float m) { return m == -INFINITE ? 0.f : m; }
