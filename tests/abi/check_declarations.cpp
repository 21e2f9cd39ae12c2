// Compile only: torch's declarations and ours in one file, so a prototype that differs is an error.
//   c++ -std=c++20 -fsyntax-only -DUSE_CUDA -I<torch>/include -Ishim tests/abi/check_declarations.cpp
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "torch_stable.h"
