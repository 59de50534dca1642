/* The CUDA runtime's functions that ONNX Runtime's CUDA provider and fly_trt call, without a GPU.
 *
 * Device memory is memory of the host, full of zeros; copies are made at once; kernels are counted and do nothing, so
 * what is computed means nothing. What counts is what the caller does: while a stream captures, whatever CUDA would
 * refuse or would record as a number of this very step is refused here too, and kept as a fault. Everything that is
 * not defined here is a function that returns 0 (libraries.py). EMULATED_SM is the compute capability, such as 90; with
 * EMULATED_CAPTURES_FAIL no kernel can be captured. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };
enum { HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3 };

typedef struct {
  unsigned x, y, z;
} dim3;

/* As far as the real structure is read: what follows stays zero. */
typedef struct {
  char name[256], uuid[16], luid[8];
  unsigned luid_mask;
  size_t total_memory, shared_memory_per_block;
  int registers_per_block, warp_size;
  size_t pitch;
  int threads_per_block, block_sizes[3], grid_sizes[3];
  size_t constant_memory;
  int major, minor;
  size_t texture_alignment, texture_pitch;
  int num_multiprocessors;
} Properties;

/* Read and set by tests. */
long emulated_launches, emulated_captured_launches, emulated_captures, emulated_graphs, emulated_graph_launches;
long emulated_host_copies, emulated_largest_device_copy, emulated_faults;
char emulated_last_fault[256];

static void *capturing; /* the stream, if any */
static int is_spoiled;  /* what it captures */
static struct {
  dim3 grid, block;
  size_t shared_memory;
  void *stream;
} configuration;
static int handle;

static int refuse(const char *what) {
  if (!capturing) return SUCCESS;
  is_spoiled = 1;
  emulated_faults++;
  snprintf(emulated_last_fault, sizeof emulated_last_fault, "%s while a stream captures", what);
  return CAPTURE_UNSUPPORTED;
}

static int capability(void) {
  const char *chosen = getenv("EMULATED_SM");
  return chosen ? atoi(chosen) : 80;
}

int cudaGetDeviceCount(int *count) { return *count = 1, SUCCESS; }
int cudaGetDevice(int *device) { return *device = 0, SUCCESS; }
int cudaSetDevice(int device) { return device ? 101 : SUCCESS; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cudaDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cudaMemGetInfo(size_t *unused, size_t *total) { return *unused = *total = 80ull << 30, SUCCESS; }
const char *cudaGetErrorString(int error) { return "refused by the emulated CUDA"; }
const char *cudaGetErrorName(int error) { return "cudaErrorEmulated"; }

int cudaGetDeviceProperties(Properties *found, int device) {
  strcpy(found->name, "Emulated GPU");
  found->total_memory = 80ull << 30;
  found->shared_memory_per_block = 49152;
  found->registers_per_block = 65536;
  found->warp_size = 32;
  found->pitch = 1 << 30;
  found->threads_per_block = found->block_sizes[0] = found->block_sizes[1] = 1024;
  found->block_sizes[2] = 64;
  found->grid_sizes[0] = 2147483647;
  found->grid_sizes[1] = found->grid_sizes[2] = 65535;
  found->constant_memory = 65536;
  found->major = capability() / 10;
  found->minor = capability() % 10;
  found->num_multiprocessors = 108;
  return SUCCESS;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;              /* threads per block */
    case 8: *value = 49152; break;             /* shared memory per block */
    case 10: *value = 32; break;               /* warp size */
    case 16: *value = 108; break;              /* multiprocessors */
    case 75: *value = capability() / 10; break; /* compute capability */
    case 76: *value = capability() % 10; break;
    case 97: *value = 166912; break;           /* shared memory per block where asked for */
    default: *value = 1;
  }
  return SUCCESS;
}

static int allocate(void **address, size_t size) {
  if (refuse("an allocation")) return CAPTURE_UNSUPPORTED;
  size = (size + 511) / 256 * 256;
  *address = aligned_alloc(256, size);
  if (!*address) return OUT_OF_MEMORY;
  memset(*address, 0, size);
  return SUCCESS;
}

static int release(void *address) {
  if (refuse("freeing memory")) return CAPTURE_UNSUPPORTED;
  free(address);
  return SUCCESS;
}

int cudaMalloc(void **address, size_t size) { return allocate(address, size); }
int cudaMallocHost(void **address, size_t size) { return allocate(address, size); }
int cudaHostAlloc(void **address, size_t size, unsigned flags) { return allocate(address, size); }
int cudaFree(void *address) { return release(address); }
int cudaFreeHost(void *address) { return release(address); }

static int copy(void *to, const void *from, size_t size, int kind) {
  if (capturing && (kind == HOST_TO_DEVICE || kind == DEVICE_TO_HOST)) return refuse("a copy from or to the host");
  if (kind == HOST_TO_DEVICE || kind == DEVICE_TO_HOST) emulated_host_copies++;
  else if (kind == DEVICE_TO_DEVICE && (long)size > emulated_largest_device_copy) emulated_largest_device_copy = size;
  memmove(to, from, size);
  return SUCCESS;
}

int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  return refuse("a copy that waits") ? CAPTURE_UNSUPPORTED : copy(to, from, size, kind);
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  return copy(to, from, size, kind);
}
int cudaMemcpy2DAsync(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t height,
                      int kind, void *stream) {
  for (size_t row = 0; row < height; row++) memmove(to + row * to_pitch, from + row * from_pitch, width);
  return SUCCESS;
}
int cudaMemset(void *address, int value, size_t size) {
  if (refuse("a memset that waits")) return CAPTURE_UNSUPPORTED;
  memset(address, value, size);
  return SUCCESS;
}
int cudaMemsetAsync(void *address, int value, size_t size, void *stream) {
  memset(address, value, size);
  return SUCCESS;
}

int cudaStreamCreate(void **stream) { return *stream = malloc(8), SUCCESS; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return *stream = malloc(8), SUCCESS; }
int cudaStreamDestroy(void *stream) { return free(stream), SUCCESS; }
int cudaEventCreate(void **event) { return *event = malloc(8), SUCCESS; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return *event = malloc(8), SUCCESS; }
int cudaEventDestroy(void *event) { return free(event), SUCCESS; }
int cudaStreamSynchronize(void *stream) { return refuse("waiting for a stream"); }
int cudaDeviceSynchronize(void) { return refuse("waiting for the device"); }
int cudaEventSynchronize(void *event) { return refuse("waiting for an event"); }

int cudaStreamIsCapturing(void *stream, int *status) { return *status = stream && stream == capturing, SUCCESS; }
int cudaStreamBeginCapture(void *stream, int mode) {
  if (refuse("a second capture")) return CAPTURE_UNSUPPORTED;
  capturing = stream;
  is_spoiled = 0;
  emulated_captures++;
  return SUCCESS;
}
int cudaStreamEndCapture(void *stream, void **graph) {
  if (!capturing || stream != capturing) return CAPTURE_INVALIDATED;
  capturing = NULL;
  *graph = is_spoiled ? NULL : &handle;
  return is_spoiled ? CAPTURE_INVALIDATED : SUCCESS;
}
int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) {
  return emulated_graphs++, *executable = &handle, SUCCESS;
}
int cudaGraphExecDestroy(void *executable) { return emulated_graphs--, SUCCESS; }
int cudaGraphLaunch(void *executable, void *stream) { return emulated_graph_launches++, SUCCESS; }

static int launch(void *stream) {
  if (capturing && getenv("EMULATED_CAPTURES_FAIL")) return refuse("a kernel that cannot be captured");
  if (capturing && stream != capturing) return refuse("a kernel on another stream");
  emulated_launches++;
  if (capturing) emulated_captured_launches++;
  return SUCCESS;
}
int cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared_memory, void *stream) {
  return launch(stream);
}
int __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared_memory, void *stream) {
  return launch(stream);
}
int cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared_memory,
                                void *stream) {
  return launch(stream);
}
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
  if (refuse("a function of the host")) return CAPTURE_UNSUPPORTED;
  function(data);
  return SUCCESS;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, void *stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared_memory = shared_memory;
  configuration.stream = stream;
  return SUCCESS;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_memory, void **stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_memory = configuration.shared_memory;
  *stream = configuration.stream;
  return SUCCESS;
}
void **__cudaRegisterFatBinary(void *binary) {
  static void *registered;
  return &registered;
}
int __cudaGetKernel(void **kernel, const void *function) { return *kernel = &handle, SUCCESS; }

int cudaPointerGetAttributes(void *attributes, const void *address) { return memset(attributes, 0, 32), SUCCESS; }
int cudaFuncGetAttributes(void *attributes, const void *function) { return memset(attributes, 0, 64), SUCCESS; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared,
                                                           unsigned flags) {
  return *blocks = 4, SUCCESS;
}
