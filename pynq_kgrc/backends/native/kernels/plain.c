#include "native.h"

#include "vectors_plain.h"

#define INSTRUCTIONS kgrc_plain
#include "tasks.inc"
