// Which CUDA errors make the device unusable for the whole process. This file needs no CUDA headers, so that it is tested
// without them.
#pragma once

namespace lares_fast {

// These are the errors for which CUDA's manual says that the process must be started again, the errors of broken memory and
// links, and the unknown error. Every other error fails only the current call. Examples are the errors of a graph capture
// (900 to 907).
constexpr bool beyond_use(int error) {
    switch (error) {
        case 214:  // cudaErrorECCUncorrectable
        case 220:  // cudaErrorNvlinkUncorrectable
        case 226:  // cudaErrorContained
        case 700:  // cudaErrorIllegalAddress
        case 702:  // cudaErrorLaunchTimeout
        case 710:  // cudaErrorAssert
        case 714:  // cudaErrorHardwareStackError
        case 715:  // cudaErrorIllegalInstruction
        case 716:  // cudaErrorMisalignedAddress
        case 717:  // cudaErrorInvalidAddressSpace
        case 718:  // cudaErrorInvalidPc
        case 719:  // cudaErrorLaunchFailure
        case 721:  // cudaErrorTensorMemoryLeak
        case 810:  // cudaErrorMpsClientTerminated
        case 911:  // cudaErrorExternalDevice
        case 999:  // cudaErrorUnknown
            return true;
        default:
            return false;
    }
}

}  // namespace lares_fast
