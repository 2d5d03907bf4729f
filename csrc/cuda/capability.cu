#include <cuda_runtime_api.h>

#include <stdexcept>

#include "cuda/capability.h"

namespace lares_fast {
namespace {

// An image of this kernel exists if the images of all kernels exist, because all are compiled for the same architectures.
__global__ void image_probe() {}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// Reading an error also clears it, so that the next CUDA call of the process does not report it.
std::string words(cudaError_t error) {
    cudaGetLastError();
    return cudaGetErrorString(error);
}

std::int64_t attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    if (const cudaError_t error = cudaDeviceGetAttribute(&value, name, device); error != cudaSuccess) {
        throw std::runtime_error(words(error));
    }
    return value;
}

}  // namespace

std::string capability(int device) {
    int driver = 0, devices = 0, current = 0;
    if (const cudaError_t error = cudaDriverGetVersion(&driver); error != cudaSuccess) return "the driver does not answer: " + words(error);
    if (driver == 0) return "no driver: no NVIDIA driver is visible to this process; install it, or make it visible";
    if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess) {
        const std::string said = words(error);
        if (error == cudaErrorInsufficientDriver) {
            return "driver older than toolkit: the driver supports CUDA " + version(driver) + ", but the module was built with CUDA " +
                   version(CUDART_VERSION);
        }
        return (error == cudaErrorNoDevice ? "no device: " : "the driver does not answer: ") + said;
    }
    if (devices == 0) return "no device: the driver finds none";
    if (device >= devices) return "no device " + std::to_string(device) + ": the number of devices is " + std::to_string(devices);
    if (const cudaError_t error = cudaGetDevice(&current); error != cudaSuccess) return "the device does not answer: " + words(error);
    if (device < 0) device = current;
    if (device != current) {
        // A query about the other device would initialise it.
        return "device " + std::to_string(device) + " was not queried, because device " + std::to_string(current) + " is the current one";
    }
    cudaDeviceProp properties{};
    if (const cudaError_t error = cudaGetDeviceProperties(&properties, device); error != cudaSuccess) {
        return "the device does not answer: " + words(error);
    }
    const std::string name =
        std::string(properties.name) + " (sm_" + std::to_string(properties.major) + std::to_string(properties.minor) + ")";
    cudaFuncAttributes attributes{};
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, image_probe); error != cudaSuccess) {
        return "no kernel image for this device: " + name + ": " + words(error);
    }
    return "ok: " + name + ", driver for CUDA " + version(driver) + ", built with CUDA " + version(CUDART_VERSION);
}

DeviceLimits device_limits(int device) {
    return {attribute(cudaDevAttrMultiProcessorCount, device), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
            attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
}

}  // namespace lares_fast
