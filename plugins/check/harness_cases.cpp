// See harness_cases.h. Logits are multiples of 1/4, which float16 and bfloat16 hold exactly, so that one reference
// serves all three types and equal maxima occur.
#include "check/harness_cases.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

namespace fly::check {
namespace {

using nvinfer1::DataType;

template <typename T>
std::vector<char> bytesOf(std::vector<T> const& values) {
    std::vector<char> bytes(values.size() * sizeof(T));
    if (!values.empty()) {
        std::memcpy(bytes.data(), values.data(), bytes.size());
    }
    return bytes;
}

std::vector<char> encodeLogits(std::vector<float> const& logits, DataType type) {
    if (type == DataType::kHALF) {
        std::vector<__half> halves;
        std::transform(
            logits.begin(), logits.end(), std::back_inserter(halves), [](float x) { return __float2half(x); });
        return bytesOf(halves);
    }
    if (type == DataType::kBF16) {
        std::vector<__nv_bfloat16> halves;
        std::transform(
            logits.begin(), logits.end(), std::back_inserter(halves), [](float x) { return __float2bfloat16(x); });
        return bytesOf(halves);
    }
    return bytesOf(logits);
}

// Logits first in the list of types, the other two behind it.
std::vector<DataType> logitsTypes(DataType first) {
    std::vector<DataType> types{first};
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        if (type != first) {
            types.push_back(type);
        }
    }
    return types;
}

Case entropyGateCase(DataType type, int32_t const& topK, int64_t vocabSize, uint32_t seed = 0) {
    int64_t const batchSize = 2;
    int64_t const numTokens = 3;
    int64_t const numRows = batchSize * numTokens;
    std::mt19937 random(static_cast<uint32_t>(vocabSize + topK) + seed);
    std::vector<float> logits(static_cast<size_t>(numRows * vocabSize));
    for (float& logit : logits) {
        logit = (static_cast<float>(random() % 65) - 32.0F) / 4.0F;
    }
    std::vector<int64_t> nextTokens, argmax;
    std::vector<int64_t> topIds;
    std::vector<float> entropy, entropyTopk, argmaxLogprob, tokenLogprob, topLogprobs;
    for (int64_t row = 0; row < numRows; ++row) {
        float const* const begin = logits.data() + row * vocabSize;
        float const* const end = begin + vocabSize;
        nextTokens.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(vocabSize)));
        auto const best = std::max_element(begin, end);
        double sum = 0;
        std::for_each(begin, end, [&](float x) { sum += std::exp(static_cast<double>(x) - *best); });
        double const logSum = *best + std::log(sum);
        auto const term = [logSum](double total, double x) { return total - std::exp(x - logSum) * (x - logSum); };
        std::vector<int64_t> ranked(static_cast<size_t>(vocabSize));
        std::iota(ranked.begin(), ranked.end(), 0);
        std::stable_sort(ranked.begin(), ranked.end(), [=](int64_t a, int64_t b) { return begin[a] > begin[b]; });
        double full = 0;
        double top = 0;
        for (int64_t i = 0; i < vocabSize; ++i) {
            int64_t const token = ranked[static_cast<size_t>(i)];
            full = term(full, begin[token]);
            if (i < topK) {
                top = full;
                topIds.push_back(token);
                topLogprobs.push_back(static_cast<float>(begin[token] - logSum));
            }
        }
        argmax.push_back(best - begin);
        entropy.push_back(static_cast<float>(full));
        entropyTopk.push_back(static_cast<float>(top));
        argmaxLogprob.push_back(static_cast<float>(*best - logSum));
        tokenLogprob.push_back(static_cast<float>(begin[nextTokens.back()] - logSum));
    }
    std::vector<int64_t> const perToken{batchSize, numTokens};
    std::vector<int64_t> const perRank{batchSize, numTokens, topK};
    Case result{"EntropyGate", "type code " + std::to_string(static_cast<int32_t>(type)) + ", top_k "
            + std::to_string(topK) + ", vocabulary " + std::to_string(vocabSize),
        {{"top_k", &topK, nvinfer1::PluginFieldType::kINT32, 1}}, {}, {}, 2e-5};
    result.inputs = {
        {"logits", "BTV", {batchSize, numTokens, vocabSize}, logitsTypes(type), encodeLogits(logits, type)},
        {"next_tokens", "BT", perToken, {DataType::kINT64}, bytesOf(nextTokens)},
    };
    result.outputs = {
        {"argmax", "BT", perToken, {DataType::kINT64}, bytesOf(argmax)},
        {"entropy", "BT", perToken, {DataType::kFLOAT}, bytesOf(entropy)},
        {"entropy_topk", "BT", perToken, {DataType::kFLOAT}, bytesOf(entropyTopk)},
        {"argmax_logprob", "BT", perToken, {DataType::kFLOAT}, bytesOf(argmaxLogprob)},
        {"token_logprob", "BT", perToken, {DataType::kFLOAT}, bytesOf(tokenLogprob)},
        {"top_ids", "BTK", perRank, {DataType::kINT64}, bytesOf(topIds)},
        {"top_logprobs", "BTK", perRank, {DataType::kFLOAT}, bytesOf(topLogprobs)},
    };
    return result;
}

constexpr int32_t kTopKs[]{3, 1, 8};  // not local: plugin fields point at them

struct Row {
    std::vector<int64_t> nextTokens, argmax;
    std::vector<float> gate;
    int64_t numContext, numDraft;
    float threshold;
    int64_t window, lookahead;
};

// How many drafts stand: the first that neither matches nor is loosened ends them.
int64_t countAccepted(Row const& row, std::vector<int64_t> const& stopTokens) {
    auto const isStop = [&](int64_t token) {
        return std::find(stopTokens.begin(), stopTokens.end(), token) != stopTokens.end();
    };
    auto const matches = [&](int64_t draft) {
        size_t const position = static_cast<size_t>(row.numContext - 1 + draft);
        return row.nextTokens[position] == row.argmax[position];
    };
    for (int64_t draft = 0; draft < row.numDraft; ++draft) {
        size_t const position = static_cast<size_t>(row.numContext - 1 + draft);
        bool loosened = row.gate[position] >= row.threshold && !isStop(row.nextTokens[position])
            && !isStop(row.argmax[position]) && draft + std::max(row.window, row.lookahead) < row.numDraft;
        for (int64_t ahead = 1; loosened && ahead <= row.lookahead; ++ahead) {
            loosened = matches(draft + ahead);
        }
        if (!matches(draft) && !loosened) {
            return draft;
        }
    }
    return row.numDraft;
}

Case looseWindowAcceptCase(std::vector<int64_t> const& stopTokens) {
    int64_t const batchSize = 64;
    int64_t const numTokens = 17;
    std::mt19937 random(7);
    auto const draw = [&random](uint32_t size) { return static_cast<int64_t>(random() % size); };
    std::vector<int64_t> nextTokens, argmax, numContext, numDraft, window, lookahead, numAccepted, nextToken;
    std::vector<float> entropy, entropyTopk, threshold;
    std::vector<int32_t> useFullEntropy;
    for (int64_t b = 0; b < batchSize; ++b) {
        Row row{};
        useFullEntropy.push_back(static_cast<int32_t>(b % 2));
        for (int64_t t = 0; t < numTokens; ++t) {
            row.argmax.push_back(draw(20));
            row.nextTokens.push_back(draw(5) == 0 ? draw(20) : row.argmax.back());
            entropy.push_back(static_cast<float>(draw(8)) / 8.0F);
            entropyTopk.push_back(static_cast<float>(draw(8)) / 8.0F);
            row.gate.push_back(b % 2 == 1 ? entropy.back() : entropyTopk.back());
        }
        row.numContext = 1 + draw(3);
        row.numDraft = b % 8 == 0 ? draw(3) : numTokens - row.numContext;  // also rows with padding and without drafts
        row.threshold = b % 16 == 3 ? std::numeric_limits<float>::infinity() : 0.25F;
        row.window = draw(7);
        row.lookahead = draw(4);
        numAccepted.push_back(countAccepted(row, stopTokens));
        nextToken.push_back(row.argmax[static_cast<size_t>(row.numContext - 1 + numAccepted.back())]);
        nextTokens.insert(nextTokens.end(), row.nextTokens.begin(), row.nextTokens.end());
        argmax.insert(argmax.end(), row.argmax.begin(), row.argmax.end());
        numContext.push_back(row.numContext);
        numDraft.push_back(row.numDraft);
        threshold.push_back(row.threshold);
        window.push_back(row.window);
        lookahead.push_back(row.lookahead);
    }
    std::vector<int64_t> const perToken{batchSize, numTokens};
    std::vector<int64_t> const perRow{batchSize};
    int64_t const numStopTokens = static_cast<int64_t>(stopTokens.size());
    Case result{"LooseWindowAccept", std::to_string(numStopTokens) + " stop tokens", {}, {}, {}, 0};
    result.inputs = {
        {"next_tokens", "BT", perToken, {DataType::kINT64}, bytesOf(nextTokens)},
        {"argmax", "BT", perToken, {DataType::kINT64}, bytesOf(argmax)},
        {"entropy", "BT", perToken, {DataType::kFLOAT}, bytesOf(entropy)},
        {"entropy_topk", "BT", perToken, {DataType::kFLOAT}, bytesOf(entropyTopk)},
        {"num_context", "B", perRow, {DataType::kINT64}, bytesOf(numContext)},
        {"num_draft", "B", perRow, {DataType::kINT64}, bytesOf(numDraft)},
        {"entropy_threshold", "B", perRow, {DataType::kFLOAT}, bytesOf(threshold)},
        {"use_full_entropy", "B", perRow, {DataType::kINT32}, bytesOf(useFullEntropy)},
        {"window", "B", perRow, {DataType::kINT64}, bytesOf(window)},
        {"lookahead", "B", perRow, {DataType::kINT64}, bytesOf(lookahead)},
        {"stop_token_ids", "N", {numStopTokens}, {DataType::kINT64}, bytesOf(stopTokens)},
    };
    result.outputs = {
        {"num_accepted", "B", perRow, {DataType::kINT64}, bytesOf(numAccepted)},
        {"next_token", "B", perRow, {DataType::kINT64}, bytesOf(nextToken)},
    };
    return result;
}

}  // namespace

std::vector<Case> allCases() {
    std::vector<Case> cases;
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        cases.push_back(entropyGateCase(type, kTopKs[0], 5003));
    }
    cases.push_back(entropyGateCase(DataType::kFLOAT, kTopKs[1], 128256));
    cases.push_back(entropyGateCase(DataType::kBF16, kTopKs[2], 896));
    cases.push_back(looseWindowAcceptCase({-1}));
    cases.push_back(looseWindowAcceptCase({2, 5, 11}));
    return cases;
}

std::vector<CasePair> pairsForOneWorkspace() {
    std::vector<CasePair> pairs;
    auto const add = [&pairs](DataType type, int32_t const& topK) {
        pairs.push_back({entropyGateCase(type, topK, 128256), entropyGateCase(type, topK, 128256, 1)});
    };
    add(DataType::kFLOAT, kTopKs[0]);
    add(DataType::kBF16, kTopKs[2]);
    return pairs;
}

}  // namespace fly::check
