// Structural similarity (Wang et al. 2004; Gaussian window of 11, sigma 1.5, range 1) of one window from its four moments, with
// the derivatives. V is a number or a vector of pixels.
#pragma once
#include "surfel.h"

namespace SURFEL_NAMESPACE {

constexpr int kWindow = 11, kReach = kWindow - 1;

// exp(-k^2 / (2 1.5^2)) for k = i - 5, normalised
template <class T> SURFEL_FN constexpr T window_weight(int i) {
  const int k = i < kWindow / 2 ? kWindow / 2 - i : i - kWindow / 2;
  return T(k == 0   ? 0.2660117248617943
           : k == 1 ? 0.21300553771125366
           : k == 2 ? 0.1093606895097
           : k == 3 ? 0.03600077212843082
           : k == 4 ? 0.007598758135239184
                    : 0.001028380084479109);
}

template <class V> struct Similarity { V value, d_mean, d_squares, d_product; };

// Moments under the window: means of x and y, of x^2 + y^2 and of x y. Derivatives are by mean_x, squares and product.
template <class T, class V> SURFEL_FN Similarity<V> similarity(const V& mean_x, const V& mean_y, const V& squares, const V& product) {
  const V c1(T(1e-4)), c2(T(9e-4)), two(T(2));
  const V both = mean_x * mean_x + mean_y * mean_y, cross = mean_x * mean_y;
  const V a1 = two * cross + c1, a2 = two * (product - cross) + c2;
  const V inverse_b1 = reciprocal(both + c1), inverse_b2 = reciprocal(squares - both + c2);
  const V inverse = inverse_b1 * inverse_b2, value = a1 * a2 * inverse;
  return {value, two * (mean_y * (a2 - a1) * inverse + mean_x * value * (inverse_b2 - inverse_b1)), negative(value * inverse_b2),
          two * a1 * inverse};
}

}  // namespace SURFEL_NAMESPACE
