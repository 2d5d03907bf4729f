/* A libcuda.so.1 that needs no GPU. It has the functions that Triton's launcher calls, and reads the attributes of the device
   from the environment. It writes launches to the file STUB_LOG, if that is set, and returns an error where the hardware would. */
#include <stdio.h>
#include <stdlib.h>

typedef struct { unsigned grid[3], block[3], shared; void* stream; void* attributes; unsigned n_attributes; } Config;

static int number(const char* name) { return atoi(getenv(name)); }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuGetErrorString(int error, const char** text) { *text = error == 1 ? "invalid argument" : "error"; return 0; }

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
        case 75: *value = number("STUB_CAPABILITY") / 10; break;
        case 76: *value = number("STUB_CAPABILITY") % 10; break;
        case 81: case 97: *value = number("STUB_SHARED"); break;
        case 10: *value = 32; break;
        case 12: *value = 65536; break;
        case 16: *value = 108; break;
        default: *value = 1000000;
    }
    return 0;
}

static char context;
int cuCtxGetCurrent(void** current) { *current = &context; return 0; }
int cuCtxSetCurrent(void* current) { return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t* value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDevicePrimaryCtxRetain(void** retained, int device) { *retained = &context; return 0; }

int cuModuleLoadData(void** module, const void* image) { *module = &context; return 0; }
int cuModuleUnload(void* module) { return 0; }
/* The handle of a function is its name. */
int cuModuleGetFunction(void** function, void* module, const char* name) {
    char* copy = malloc(256);
    snprintf(copy, 256, "%s", name);
    *function = copy;
    return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) { *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0; return 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return attribute == 17; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int* n, void* function, void* config) { *n = 1; return 0; }
int cuPointerGetAttribute(void* result, int attribute, unsigned long long pointer) { *(unsigned long long*)result = pointer; return 0; }
int cuStreamIsCapturing(void* stream, int* status) { *status = 0; return 0; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }

int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
    const unsigned *grid = config->grid, *block = config->block;
    if (grid[1] > 65535 || grid[2] > 65535 || block[0] * block[1] * block[2] > 1024 || config->shared > (unsigned)number("STUB_SHARED"))
        return 1;
    if (!getenv("STUB_LOG"))
        return 0;
    FILE* log = fopen(getenv("STUB_LOG"), "a");
    fprintf(log, "%s %p %u %u %u %u\n", (char*)function, function, grid[0], grid[1] * grid[2], block[0], config->shared);
    fclose(log);
    return 0;
}
