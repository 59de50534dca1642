// The entry point that ONNX Runtime looks for in a library of custom operators.
#include "cache_attention.h"
#include "entropy_gate.h"
#include "int8_linear.h"
#include "loose_window_accept.h"
#include "operator.h"
#include "rotary_tables.h"

namespace {

constexpr const char* kDomain = "fly.cpu";

}  // namespace

// The kind of kernels that runs in this process (dispatch.cpp); null where there is none.
extern "C" __attribute__((visibility("default"))) const char* fly_cpu_kernels_name() {
    try {
        return fly::kernels().name;
    } catch (const std::exception&) {
        return nullptr;
    }
}

extern "C" __attribute__((visibility("default"))) fly::abi::Status* RegisterCustomOps(
    fly::abi::SessionOptions* options, const fly::abi::ApiBase* base) {
    using namespace fly;
    const abi::Api* api = base->GetApi(abi::API_VERSION);
    if (api == nullptr) return nullptr;  // an older ONNX Runtime: it says that it does not know the operators
    try {
        kernels();
    } catch (const std::exception& error) {
        return failed(api, error.what());
    }
    static abi::CustomOpDomain* domain = nullptr;
    if (domain == nullptr) {
        const abi::CustomOp* const operators[] = {
            operator_of<CacheAttention<float>>(),
            operator_of<CacheAttention<Half>>(),
            operator_of<EntropyGate>(),
            operator_of<Int8Linear>(),
            operator_of<LooseWindowAccept>(),
            operator_of<RotaryTables>(),
        };
        if (auto* status = api->get<abi::Status*(const char*, abi::CustomOpDomain**)>(abi::kCreateCustomOpDomain)(kDomain, &domain)) return status;
        for (const abi::CustomOp* op : operators)
            if (auto* status = api->get<abi::Status*(abi::CustomOpDomain*, const abi::CustomOp*)>(abi::kCustomOpDomainAdd)(domain, op)) return status;
    }
    return api->get<abi::Status*(abi::SessionOptions*, abi::CustomOpDomain*)>(abi::kAddCustomOpDomain)(options, domain);
}
