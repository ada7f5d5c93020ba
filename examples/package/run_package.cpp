// SPDX-License-Identifier: MIT
// Runs the model that make_package.py compiled, on the CPU and without Python. The operators come
// from libconvnn_cpu.so, which has to be loaded before the package.
#include <ATen/Functions.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <exception>

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: run_package libconvnn_cpu.so model.pt2\n");
    return 2;
  }
  if (dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  try {
    torch::inductor::AOTIModelPackageLoader model(arguments[2]);
    const at::Tensor images = at::linspace(-1, 1, 2 * 3 * 8 * 8).sin().reshape({2, 3, 8, 8});
    const at::Tensor output = model.run({images}).at(0);
    for (int64_t i = 0; i < output.size(0); ++i) {
      for (int64_t j = 0; j < output.size(1); ++j) {
        std::printf(j == 0 ? "%.6f" : " %.6f", output[i][j].item<double>());
      }
      std::printf("\n");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
