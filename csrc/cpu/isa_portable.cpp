// Any processor: vectors of four floats as the compiler lowers them.
#include "isa.h"

GATE4D_DEFINE_KERNELS(portable, "portable")
