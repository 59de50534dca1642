// The entry point that ONNX Runtime looks for in a library of custom operators.
#include <mutex>
#include <string>

#include "cache_attention.h"
#include "entropy_gate.h"
#include "int8_linear.h"
#include "loose_window_accept.h"
#include "operator.h"
#include "rotary_tables.h"

namespace {

using namespace fly;

constexpr const char* kDomain = "fly.cpu";

abi::Status* add_operators(const abi::Api* api, abi::CustomOpDomain* domain) {
    const abi::CustomOp* const operators[] = {
        operator_of<CacheAttention<float>>(), operator_of<CacheAttention<Half>>(),
        operator_of<EntropyGate>(),           operator_of<Int8Linear>(),
        operator_of<LooseWindowAccept>(),     operator_of<RotaryTables>(),
    };
    for (const abi::CustomOp* op : operators)
        if (auto* status =
                api->get<abi::Status*(abi::CustomOpDomain*, const abi::CustomOp*)>(abi::kCustomOpDomainAdd)(domain, op))
            return status;
    return nullptr;
}

// One for all sessions, which may be made in several threads, and only with all of its operators.
abi::Status* shared_domain(const abi::Api* api, abi::CustomOpDomain** found) {
    static std::mutex mutex;
    static abi::CustomOpDomain* domain = nullptr;
    const std::lock_guard lock(mutex);
    if (domain == nullptr) {
        abi::CustomOpDomain* made = nullptr;
        if (auto* status =
                api->get<abi::Status*(const char*, abi::CustomOpDomain**)>(abi::kCreateCustomOpDomain)(kDomain, &made))
            return status;
        if (auto* status = add_operators(api, made)) {
            api->get<void(abi::CustomOpDomain*)>(abi::kReleaseCustomOpDomain)(made);
            return status;
        }
        domain = made;
    }
    *found = domain;
    return nullptr;
}

}  // namespace

// The kind of kernels that runs in this process (dispatch.cpp); null where there is none.
extern "C" __attribute__((visibility("default"))) const char* fly_cpu_kernels_name() {
    try {
        return kernels().name;
    } catch (const std::exception&) {
        return nullptr;
    }
}

extern "C" __attribute__((visibility("default"))) abi::Status* RegisterCustomOps(
    abi::SessionOptions* options, const abi::ApiBase* base) {
    const abi::Api* api = base->GetApi(abi::API_VERSION);
    if (api == nullptr) {
        const std::string own =
            "fly-trt's CPU kernels need ONNX Runtime 1." + std::to_string(abi::API_VERSION) + " or later, this is ";
        return failed(base->GetApi(abi::FIRST_API_VERSION), (own + base->GetVersionString()).c_str());
    }
    try {
        kernels();
    } catch (const std::exception& error) {
        return failed(api, error.what());
    }
    abi::CustomOpDomain* domain = nullptr;
    if (auto* status = shared_domain(api, &domain)) return status;
    return api->get<abi::Status*(abi::SessionOptions*, abi::CustomOpDomain*)>(abi::kAddCustomOpDomain)(options, domain);
}
