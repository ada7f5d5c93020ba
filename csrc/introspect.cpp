// SPDX-License-Identifier: MIT
// The module convnn_kernels.introspect: what was built. It needs neither PyTorch nor the libraries
// nor a GPU. It fits one version of Python; introspect.py takes its place in any other.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {

std::vector<std::string> split(const char* list) {
  std::istringstream stream(list);
  std::vector<std::string> items;
  for (std::string item; std::getline(stream, item, ',');) {
    items.push_back(item);
  }
  return items;
}

using Resources = std::map<std::string, std::map<std::string, long>>;

Resources cuda_kernels() {
  return {
#ifdef CONVNN_CUDA_KERNELS
#include "cuda_kernels.inc"
#endif
  };
}

}  // namespace

PYBIND11_MODULE(introspect, m) {
  m.doc() = "What the native parts of convnn_kernels were built for.";
  m.def(
      "version", [] { return std::string(CONVNN_VERSION); },
      "Version of convnn_kernels that was built.");
  m.def(
      "compiler", [] { return std::string(CONVNN_COMPILER); },
      "Name and version of the C++ compiler.");
  m.def(
      "cpu_instruction_sets", [] { return split(CONVNN_INSTRUCTION_SETS); },
      "Instruction sets the CPU kernels were compiled for, from the most basic to the most "
      "advanced.");
  m.def(
      "cuda_architectures", [] { return split(CONVNN_CUDA_ARCHITECTURES); },
      "Architectures the CUDA kernels were compiled for; empty without the CUDA library.");
  m.def(
      "cuda_kernels", cuda_kernels,
      "For each architecture and CUDA kernel: registers, local (stack and spill) and shared bytes, "
      "and the occupancy that they allow, in percent. Empty without the CUDA library, or if "
      "cuobjdump was not found when it was built.");
}
