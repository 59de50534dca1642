// A row of logits: its most probable tokens and its entropies, in two passes. For the file of each kind of lanes.
#pragma once

#include <cmath>
#include <limits>

#include "kernels.h"

namespace fly {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr size_t kLanes = 16;
constexpr size_t kScanned = 4 * kLanes;  // logits that one comparison is for
constexpr size_t kSummed = 64 * kLanes;  // and that are added up before they are added to the others

// The natural logarithm of a positive number, in operations that give the same bits wherever they are compiled.
inline double natural_log(double x) {
    uint64_t bits;
    __builtin_memcpy(&bits, &x, 8);
    int64_t exponent = static_cast<int64_t>(bits >> 52) - 1023;
    bits = (bits & 0xFFFFFFFFFFFFF) | (uint64_t{1023} << 52);
    double m;
    __builtin_memcpy(&m, &bits, 8);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        ++exponent;
    }
    // 2 atanh(s), of which s is at most 0.172.
    const double s = (m - 1) / (m + 1), square = s * s;
    double series = 0;
    for (int n = 19; n >= 1; n -= 2) series = series * square + 1.0 / n;
    return static_cast<double>(exponent) * 0.6931471805599453 + 2 * s * series;
}

// Puts a logit behind all of the first `count` that are not less; what was the last of `room` falls out.
inline void insert(float logit, int64_t id, size_t count, size_t room, float* logits, int64_t* ids) {
    size_t at = count < room ? count : room - 1;
    for (; at > 0 && logits[at - 1] < logit; --at) {
        logits[at] = logits[at - 1];
        ids[at] = ids[at - 1];
    }
    logits[at] = logit;
    ids[at] = id;
}

inline void find_largest(const float* logits, size_t vocab_size, size_t top_k, float* top_logits, int64_t* top_ids) {
    size_t i = 0;
    for (; i < top_k; ++i) insert(logits[i], static_cast<int64_t>(i), i, top_k, top_logits, top_ids);
    const auto consider = [&](size_t end) {
        for (; i < end; ++i)
            if (logits[i] > top_logits[top_k - 1])
                insert(logits[i], static_cast<int64_t>(i), top_k, top_k, top_logits, top_ids);
    };
    while (i + kScanned <= vocab_size) {
        const float* p = logits + i;
        const Lanes first = max(Lanes::load(p), Lanes::load(p + kLanes));
        const Lanes second = max(Lanes::load(p + 2 * kLanes), Lanes::load(p + 3 * kLanes));
        if (any_greater(max(first, second), Lanes::all(top_logits[top_k - 1])))
            consider(i + kScanned);
        else
            i += kScanned;
    }
    consider(vocab_size);
}

struct Sums {
    Lanes exponentials, weighted;

    // `x` minus the largest. A NaN, which the second operand of max() keeps, stays in `weighted`.
    void add(Lanes x) {
        x = max(Lanes::all(kNoPower), x);
        const Lanes e = exponential(x);
        exponentials = exponentials + e;
        weighted = fma(e, x, weighted);
    }
};

inline Lanes padded(const float* p, size_t n) {
    if (n >= kLanes) return Lanes::load(p);
    float whole[kLanes];
    for (size_t i = 0; i < kLanes; ++i) whole[i] = i < n ? p[i] : kMinusInfinity;
    return Lanes::load(whole);
}

// sum(e) and sum(e x) of e = exp(x), x = logit - largest.
[[gnu::noinline]] Sums sum_exponentials(const float* logits, size_t vocab_size, float largest) {
    Sums total = {Lanes::zero(), Lanes::zero()};
    const Lanes top = Lanes::all(largest);
    for (size_t begin = 0; begin < vocab_size; begin += kSummed) {
        const size_t end = begin + kSummed < vocab_size ? begin + kSummed : vocab_size;
        Sums part = {Lanes::zero(), Lanes::zero()};
        size_t i = begin;
        for (; i + kLanes <= end; i += kLanes) part.add(Lanes::load(logits + i) - top);
        if (i < end) part.add(padded(logits + i, end - i) - top);
        total.exponentials = total.exponentials + part.exponentials;
        total.weighted = total.weighted + part.weighted;
    }
    return total;
}

RowEntropies read_logits(const float* logits, size_t vocab_size, size_t top_k, int64_t* top_ids, float* top_logprobs) {
    find_largest(logits, vocab_size, top_k, top_logprobs, top_ids);
    const float largest = top_logprobs[0];
    const Sums sums = sum_exponentials(logits, vocab_size, largest);
    const double all = sum(sums.exponentials), weighted = sum(sums.weighted);
    RowEntropies row;
    row.largest = largest;
    row.log_sum = weighted == weighted ? natural_log(all) : std::numeric_limits<double>::quiet_NaN();
    row.entropy = static_cast<float>(row.log_sum - weighted / all);
    Sums top = {Lanes::zero(), Lanes::zero()};
    for (size_t i = 0; i < top_k; ++i)
        top_logprobs[i] = static_cast<float>(top_logprobs[i] - row.largest - row.log_sum);
    for (size_t i = 0; i < top_k; i += kLanes) top.add(padded(top_logprobs + i, top_k - i));
    row.entropy_topk = -sum(top.weighted);
    return row;
}

}  // namespace
}  // namespace fly
