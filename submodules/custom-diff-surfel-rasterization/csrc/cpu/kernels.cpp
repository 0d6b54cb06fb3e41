// Compiled once per CPU generation, with -DSURFEL_NAMESPACE=surfel_<name> and that generation's flags (see setup.py).
#include "ssim.h"
#include "tiles.h"

namespace SURFEL_NAMESPACE {

template <class T> const Kernels<T>* kernels() {
  static const Kernels<T> table = {
      place<T>,
      project_backward<T>,
      {{forward_tile<T, 0, false>, forward_tile<T, 0, true>},
       {forward_tile<T, 3, false>, forward_tile<T, 3, true>},
       {forward_tile<T, 4, false>, forward_tile<T, 4, true>},
       {forward_tile<T, 7, false>, forward_tile<T, 7, true>},
       {forward_tile<T, 8, false>, forward_tile<T, 8, true>}},
      {{backward_tile<T, 0, false>, backward_tile<T, 0, true>},
       {backward_tile<T, 3, false>, backward_tile<T, 3, true>},
       {backward_tile<T, 4, false>, backward_tile<T, 4, true>},
       {backward_tile<T, 7, false>, backward_tile<T, 7, true>},
       {backward_tile<T, 8, false>, backward_tile<T, 8, true>}},
      loss_band<T>};
  return &table;
}

}  // namespace SURFEL_NAMESPACE

#define SURFEL_JOIN2(a, b) a##b
#define SURFEL_JOIN(a, b) SURFEL_JOIN2(a, b)
const Kernels<float>* SURFEL_JOIN(SURFEL_NAMESPACE, _float)() { return SURFEL_NAMESPACE::kernels<float>(); }
const Kernels<double>* SURFEL_JOIN(SURFEL_NAMESPACE, _double)() { return SURFEL_NAMESPACE::kernels<double>(); }
