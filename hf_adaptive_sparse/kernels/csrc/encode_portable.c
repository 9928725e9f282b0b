/* Portable C: any processor, any compiler with C11. */
#define TARGET
#define VARIANT(name) name##_portable

#include "encode_body.h"
