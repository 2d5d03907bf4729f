// Launches kernels on a stream and collects errors.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/errors.h"

namespace lares_fast {

// Work on one stream of `device`, which must be the current device. A switch of the device here would initialise a device
// that the process perhaps may not use. After the first error no further work is enqueued.
class DeviceQueue {
public:
    DeviceQueue(int device, std::uintptr_t stream) : device_(device), stream_(reinterpret_cast<cudaStream_t>(stream)) {
        int current = 0;
        note(cudaGetDevice(&current));
        if (error_ == cudaSuccess && current != device) {
            throw std::invalid_argument("device " + std::to_string(device) + " must be the current device, but device " +
                                        std::to_string(current) + " is");
        }
    }
    DeviceQueue(const DeviceQueue&) = delete;
    DeviceQueue& operator=(const DeviceQueue&) = delete;

    void clear(void* pointer, std::size_t bytes) {
        if (error_ == cudaSuccess) note(cudaMemsetAsync(pointer, 0, bytes, stream_));
    }

    template <class... Parameters, class... Arguments>
    void launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::int64_t shared_bytes, Arguments... arguments) {
        if (error_ == cudaSuccess) allow(reinterpret_cast<const void*>(kernel), static_cast<int>(shared_bytes));
        if (error_ != cudaSuccess) return;
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
        config.stream = stream_;
        note(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
    }

    // Returns the first error, or "". Throws std::runtime_error if the device is unusable.
    std::string error() const {
        if (error_ == cudaSuccess) return "";
        const std::string said = std::string(cudaGetErrorName(error_)) + ": " + cudaGetErrorString(error_);
        if (!beyond_use(error_)) return said;
        throw std::runtime_error(said + "; the device is unusable for this process: start the process again");
    }

private:
    void note(cudaError_t error) {
        error_ = error;
        // Reading an error clears it, so that the next CUDA call of the process does not report it.
        if (error != cudaSuccess) cudaGetLastError();
    }

    // A kernel needs permission, once a device, to use more than 48 KiB of shared memory. The permitted size never shrinks,
    // because another thread may need it.
    void allow(const void* kernel, int bytes) {
        static std::mutex mutex;
        static std::map<std::pair<int, const void*>, int> allowed;
        const std::lock_guard<std::mutex> lock(mutex);
        int& most = allowed[{device_, kernel}];
        if (bytes <= most) return;
        note(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        if (error_ == cudaSuccess) most = bytes;
    }

    int device_;
    cudaStream_t stream_;
    cudaError_t error_ = cudaSuccess;
};

}  // namespace lares_fast
