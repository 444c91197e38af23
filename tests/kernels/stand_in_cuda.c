/* A libcuda.so.1 without a GPU: what Triton's launcher calls of it, and a note of the last launch.
   It knows of each argument only where it lies, so that `expect` says beforehand how long they are. */

#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned number;
} Config;

static int lengths[256], count, launches;
static unsigned char last[256 * 8];
static unsigned grid[3], block[3];
static void *stream, *function;

void expect(int n, const int *bytes) {
  count = n;
  memcpy(lengths, bytes, n * sizeof(int));
}

/* Arguments of the last launch, eight bytes each; how many launches there were. */
int last_launch(unsigned char *arguments, unsigned long long *rest) {
  memcpy(arguments, last, count * 8);
  for (int i = 0; i < 3; i++)
    rest[i] = grid[i], rest[3 + i] = block[i];
  rest[6] = (unsigned long long)stream;
  rest[7] = (unsigned long long)function;
  return launches;
}

int cuLaunchKernelEx(const Config *config, void *kernel, void **arguments, void **extra) {
  memcpy(grid, config->grid, sizeof grid);
  memcpy(block, config->block, sizeof block);
  stream = config->stream, function = kernel;
  memset(last, 0, sizeof last);
  for (int i = 0; i < count; i++)
    memcpy(last + 8 * i, arguments[i], lengths[i]);
  launches++;
  return 0;
}

int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
  *(unsigned long long *)data = pointer;
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : 232448; /* the capability's first number; all else is memory */
  return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *kernel) {
  *value = attribute == 0 ? 1024 : 0; /* threads that a block may have */
  return 0;
}

int cuModuleGetFunction(void **kernel, void *module, const char *name) {
  static long made;
  *kernel = (void *)(4096 + 16 * ++made);
  return 0;
}

int cuCtxGetCurrent(void **context) {
  *context = (void *)1;
  return 0;
}

int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)1;
  return 0;
}

int cuGetErrorString(int code, const char **text) {
  *text = "none";
  return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGet(int *device, int number) { return *device = number, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(unsigned long *value, int limit) { return *value = 0, 0; }
int cuModuleUnload(void *module) { return 0; }
int cuStreamIsCapturing(void *of, int *status) { return *status = 0, 0; }
int cuCtxSetLimit(int limit, unsigned long value) { return 0; }
int cuFuncSetCacheConfig(void *kernel, int preference) { return 0; }
int cuFuncSetAttribute(void *kernel, int attribute, int value) { return 0; }
int cuOccupancyMaxActiveClusters(int *value, void *kernel, const void *config) { return *value = 1, 0; }
int cuTensorMapEncodeTiled(void *map) { return 0; }
int cuTensorMapEncodeIm2col(void *map) { return 0; }
