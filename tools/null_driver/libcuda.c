// SPDX-License-Identifier: MIT
// The functions of the CUDA driver that Triton calls, doing nothing but counting launches: with it a
// launch takes the time of the host alone, on a machine without a GPU. Queries answer with a number
// that suits all of them.
#include <stddef.h>

#define IGNORES(name) \
  int name(void) { return 0; }

enum { kAnswer = 1024 };

static int launches;

int convnn_launches(void) { return launches; }
int cuLaunchKernelEx(void) {
  ++launches;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = (void*)8;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)attribute, (void)device;
  *value = 256 * kAnswer;
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  (void)attribute, (void)function;
  *value = kAnswer;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  (void)image;
  *module = (void*)8;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module, (void)name;
  *function = (void*)8;
  return 0;
}
int cuPointerGetAttribute(void* value, int attribute, unsigned long long pointer) {
  (void)attribute;
  *(unsigned long long*)value = pointer;
  return 0;
}
IGNORES(cuCtxGetLimit)
IGNORES(cuCtxSetCurrent)
IGNORES(cuCtxSetLimit)
IGNORES(cuDeviceGet)
IGNORES(cuDevicePrimaryCtxRetain)
IGNORES(cuDriverGetVersion)
IGNORES(cuFuncSetAttribute)
IGNORES(cuFuncSetCacheConfig)
IGNORES(cuGetErrorString)
IGNORES(cuLaunchKernelExHandle)
IGNORES(cuOccupancyMaxActiveClusters)
IGNORES(cuTensorMapEncodeIm2col)
IGNORES(cuTensorMapEncodeTiled)
