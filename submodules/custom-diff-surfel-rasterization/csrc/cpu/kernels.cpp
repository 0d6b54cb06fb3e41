// Compiled once per CPU generation, with -DSURFEL_NAMESPACE=surfel_<name> and that generation's flags (see setup.py).
#include "tiles.h"

#define SURFEL_JOIN2(a, b) a##b
#define SURFEL_JOIN(a, b) SURFEL_JOIN2(a, b)
const Kernels<float>* SURFEL_JOIN(SURFEL_NAMESPACE, _float)() { return SURFEL_NAMESPACE::kernels<float>(); }
const Kernels<double>* SURFEL_JOIN(SURFEL_NAMESPACE, _double)() { return SURFEL_NAMESPACE::kernels<double>(); }
