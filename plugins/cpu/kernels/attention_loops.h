// Attention over a cache, for the file of each kind of lanes, which says how many Lanes a product sums up at once:
// kProductLanes.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"
#include "attention_products.h"

namespace fly {
namespace {

constexpr float kLog2E = 1.44269504088896341F;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Some of the keys, counted from the first of all or of a chunk.
struct Span {
    size_t first, end;

    bool is_empty() const { return first >= end; }
    size_t first_block() const { return first / kKeyBlock; }
    size_t end_block() const { return (end + kKeyBlock - 1) / kKeyBlock; }
};

inline size_t position_of(const Attention& a, size_t sequence, size_t row) {
    return static_cast<size_t>(a.write_indices[sequence]) + row / a.group_size();
}

inline Span seen_from(const Attention& a, size_t position) {
    return {a.window != 0 && position >= a.window ? position + 1 - a.window : 0, position + 1};
}

inline Span of_chunk(Span keys, size_t chunk) {
    const size_t start = chunk * kKeyChunk;
    const auto within = [&](size_t key) { return key <= start ? 0 : least(key - start, kKeyChunk); };
    return {within(keys.first), within(keys.end)};
}

// A head's channels of one token, with norm and rotation.
inline void prepare(const Attention& a, const float* x, const float* norm, size_t token, float* result) {
    if (norm != nullptr) {
        Lanes squares = Lanes::zero();
        for (size_t i = 0; i < a.head_dim; i += 16) squares = fma(Lanes::load(x + i), Lanes::load(x + i), squares);
        const float mean = sum(squares) / static_cast<float>(a.head_dim);
        const Lanes factor = Lanes::all(1.0F / std::sqrt(mean + a.epsilon));
        for (size_t i = 0; i < a.head_dim; i += 16)
            (Lanes::load(x + i) * factor * Lanes::load(norm + i)).store(result + i);
    } else {
        std::memcpy(result, x, a.head_dim * sizeof(float));
    }
    const size_t half = a.half_rotated;
    for (size_t i = 0; i < half; i += 16) {
        const size_t n = half - i;
        const Lanes cosine = Lanes::load(a.cosines + token * half + i, n),
                    sine = Lanes::load(a.sines + token * half + i, n);
        const Lanes left = Lanes::load(result + i, n), right = Lanes::load(result + half + i, n);
        (left * cosine - right * sine).store(result + i, n);
        (right * cosine + left * sine).store(result + half + i, n);
    }
}

inline void narrow(const float* from, float* to, size_t count) { std::memcpy(to, from, count * sizeof(float)); }
// What is not a number stays so: min and max return their second operand then.
inline void narrow(const float* from, Half* to, size_t count) {
    const Lanes most = Lanes::all(65504.0F), least = Lanes::all(-65504.0F);
    for (size_t i = 0; i < count; i += 16) max(least, min(most, Lanes::load(from + i))).store(to + i);
}

inline void widen(const Half* from, size_t count, float* to) {
    for (size_t i = 0; i < count; i += 16) Lanes::load(from + i).store(to + i);
}

template <typename Element>
void store_tokens(const Attention& a, size_t sequence, size_t first, size_t end, float* scratch) {
    float* prepared = scratch;
    Element* narrowed = reinterpret_cast<Element*>(scratch + a.head_dim);
    for (size_t t = first; t < end; ++t) {
        const size_t token = sequence * a.tokens + t;
        const size_t position = static_cast<size_t>(a.write_indices[sequence]) + t;
        for (size_t head = 0; head < a.kv_heads; ++head) {
            const size_t base = (sequence * a.kv_heads + head) * a.capacity * a.head_dim;
            const size_t from = token * a.key_stride + head * a.head_dim;
            narrow(a.value + from, static_cast<Element*>(a.values) + base + position * a.head_dim, a.head_dim);
            prepare(a, a.key + from, a.key_norm, token, prepared);
            narrow(prepared, narrowed, a.head_dim);
            const size_t block = position / kKeyBlock * kKeyBlock;
            Element* to = static_cast<Element*>(a.keys) + base + block * a.head_dim + position % kKeyBlock;
            for (size_t d = 0; d < a.head_dim; ++d) to[d * kKeyBlock] = narrowed[d];
        }
    }
}

void store(const Attention& a, size_t sequence, size_t first, size_t end, float* scratch) {
    (a.is_half ? store_tokens<Half> : store_tokens<float>)(a, sequence, first, end, scratch);
}

// A task's queries, [rows][channels], times what makes their products powers of 2. One that is not finite is NaN in all
// channels, so that its row is, whatever a soft cap makes of infinity.
inline void prepare_queries(const Attention& a, const AttentionTask& task, float* queries) {
    const size_t group_size = a.group_size();
    const Lanes scale = Lanes::all(a.scale * kLog2E),
                not_a_number = Lanes::all(std::numeric_limits<float>::quiet_NaN());
    size_t token = task.sequence * a.tokens + task.first_row / group_size, within = task.first_row % group_size;
    for (size_t row = task.first_row; row < task.end_row; ++row, queries += a.head_dim) {
        const size_t head = task.kv_head * group_size + within;
        prepare(a, a.query + token * a.query_stride + head * a.head_dim, a.query_norm, token, queries);
        bool is_finite = true;
        for (size_t i = 0; i < a.head_dim; i += 16) {
            const Lanes x = Lanes::load(queries + i) * scale;
            is_finite &= !any_not_finite(x);
            x.store(queries + i);
        }
        for (size_t i = 0; i < a.head_dim && !is_finite; i += 16) not_a_number.store(queries + i);
        if (++within == group_size) within = 0, ++token;
    }
}

// cap * tanh(score / cap), of scores that are exponents of 2.
inline void cap_scores(float* scores, Span seen, float softcap) {
    const Lanes slope = Lanes::all(2.0F / softcap), cap = Lanes::all(softcap * kLog2E), one = Lanes::all(1.0F);
    for (size_t i = seen.first_block() * 16; i < seen.end_block() * 16; i += 16) {
        const Lanes bounded = max(Lanes::all(-60.0F), min(Lanes::all(60.0F), Lanes::load(scores + i) * slope));
        const Lanes power = power_of_two_near_zero(bounded);
        (cap * ((power - one) / (power + one))).store(scores + i);
    }
}

struct Peak {
    float most, total;
};

// The largest of a query's scores of a chunk, after what it does not see was made -inf.
inline float largest_score(float* scores, Span seen) {
    const size_t first = seen.first_block() * 16, end = seen.end_block() * 16;
    for (size_t i = first; i < seen.first; ++i) scores[i] = -kInfinity;
    for (size_t i = seen.end; i < end; ++i) scores[i] = -kInfinity;
    Lanes most = Lanes::all(-kInfinity);
    for (size_t i = first; i < end; i += 16) most = max(most, Lanes::load(scores + i));
    return largest(most);
}

// Turns a query's scores of a chunk into weights, in place, of which the largest is 1. Returns their sum.
inline float weigh_scores(float* scores, Span seen, float most) {
    const Lanes peak = Lanes::all(most);
    Lanes total = Lanes::zero();
    for (size_t i = seen.first_block() * 16; i < seen.end_block() * 16; i += 16) {
        const Lanes weight = small_power_of_two(Lanes::load(scores + i) - peak);
        weight.store(scores + i);
        total = total + weight;
    }
    return sum(total);
}

// A state is what a query has seen so far: [channels] of weighted values, the largest score, the sum of the weights.
inline void set_state(float* state, const float* sums, Peak peak, size_t dim) {
    std::memcpy(state, sums, dim * sizeof(float));
    state[dim] = peak.most;
    state[dim + 1] = peak.total;
}

inline void merge_state(float* state, const float* sums, Peak peak, size_t dim) {
    const float most = state[dim] > peak.most ? state[dim] : peak.most;
    const Lanes before = small_power_of_two(Lanes::all(state[dim] - most));
    const Lanes now = small_power_of_two(Lanes::all(peak.most - most));
    for (size_t i = 0; i < dim; i += 16)
        fma(Lanes::load(state + i), before, Lanes::load(sums + i) * now).store(state + i);
    state[dim] = most;
    state[dim + 1] = state[dim + 1] * first_of(before) + peak.total * first_of(now);
}

inline float* state_of(const Attention& a, float* states, size_t sequence, size_t kv_head, size_t row, size_t chunk) {
    const size_t index = ((sequence * a.kv_heads + kv_head) * a.rows() + row) * a.num_chunks + chunk;
    return states + index * a.state_size();
}

inline void write_output(const Attention& a, size_t sequence, size_t kv_head, size_t row, const float* state) {
    const size_t token = sequence * a.tokens + row / a.group_size();
    const size_t head = kv_head * a.group_size() + row % a.group_size();
    float* output = a.output + (token * a.heads + head) * a.head_dim;
    const Lanes total = Lanes::all(state[a.head_dim + 1]);
    for (size_t i = 0; i < a.head_dim; i += 16) (Lanes::load(state + i) / total).store(output + i);
}

// The weighted values of each row of a group. What a row does not see is left out, not multiplied by 0: it need not be
// a number. So keys that all rows see are taken together, and those at the ends by each row alone.
template <typename Element>
void weigh_values(
    const Span* seen, size_t count, const float* weights, const Element* values, size_t dim, float* sums) {
    const size_t end = seen[0].end;
    const size_t first = least(seen[count - 1].first, end);
    std::memset(sums, 0, count * dim * sizeof(float));
    const auto alone = [&](size_t r, size_t from, size_t to) {
        if (from < to) weigh<1>(weights + r * kKeyChunk + from, values + from * dim, to - from, dim, sums + r * dim);
    };
    for (size_t r = 0; r < count; ++r) alone(r, seen[r].first, least(first, seen[r].end));
    if (first < end) weigh_rows(count, weights + first, values + first * dim, end - first, dim, sums);
    for (size_t r = 0; r < count; ++r) alone(r, end > seen[r].first ? end : seen[r].first, seen[r].end);
}

// Where the parts of a task's scratch begin, and which keys each of its rows sees.
struct Workspace {
    float *queries, *states, *scores, *sums, *keys, *values;
    Span* seen;

    Workspace(const Attention& a, const AttentionTask& task, float* scratch) {
        const size_t num_rows = task.end_row - task.first_row;
        queries = scratch;
        states = queries + num_rows * a.head_dim;
        scores = states + num_rows * a.state_size();
        sums = scores + kQueryGroup * kKeyChunk;
        keys = sums + kQueryGroup * a.head_dim;
        values = keys + kKeyChunk * a.head_dim;
        seen = reinterpret_cast<Span*>(values + kKeyChunk * a.head_dim);
        static_assert(sizeof(Span) <= kSpanSize * sizeof(float));
        for (size_t row = 0; row < num_rows; ++row)
            seen[row] = seen_from(a, position_of(a, task.sequence, task.first_row + row));
    }
};

// Up to kQueryGroup rows of the task from its `row` on, at one chunk.
template <typename Element>
void attend_group(
    const Attention& a, const AttentionTask& task, size_t row, size_t count, size_t chunk, const Element* keys,
    const Element* values, const Workspace& work, float* states) {
    const size_t dim = a.head_dim;
    Span seen[kQueryGroup];
    for (size_t r = 0; r < count; ++r) seen[r] = of_chunk(work.seen[row + r], chunk);
    const Span all = {seen[0].first, seen[count - 1].end};
    if (all.is_empty()) return;
    const size_t block = all.first_block();
    score_rows(
        count, work.queries + row * dim, keys + block * kKeyBlock * dim, all.end_block() - block, dim,
        work.scores + block * kKeyBlock);
    Peak peaks[kQueryGroup] = {};
    for (size_t r = 0; r < count; ++r) {
        if (seen[r].is_empty()) continue;
        if (a.softcap > 0) cap_scores(work.scores + r * kKeyChunk, seen[r], a.softcap);
        peaks[r].most = largest_score(work.scores + r * kKeyChunk, seen[r]);
    }
    for (size_t r = 0; r < count; ++r)
        peaks[r].total = weigh_scores(work.scores + r * kKeyChunk, seen[r], peaks[r].most);
    weigh_values(seen, count, work.scores, values, dim, work.sums);
    for (size_t r = 0; r < count; ++r) {
        if (seen[r].is_empty()) continue;
        const float* sums = work.sums + r * dim;
        float* state = work.states + (row + r) * a.state_size();
        if (states != nullptr)
            set_state(
                state_of(a, states, task.sequence, task.kv_head, task.first_row + row + r, chunk), sums, peaks[r], dim);
        else if (work.seen[row + r].first / kKeyChunk == chunk)
            set_state(state, sums, peaks[r], dim);
        else
            merge_state(state, sums, peaks[r], dim);
    }
}

template <typename Element>
void attend_groups(
    const Attention& a, const AttentionTask& task, size_t chunk, const Element* keys, const Element* values,
    const Workspace& work, float* states) {
    const size_t num_rows = task.end_row - task.first_row;
    for (size_t row = 0; row < num_rows; row += kQueryGroup)
        attend_group(a, task, row, least(kQueryGroup, num_rows - row), chunk, keys, values, work, states);
}

// One chunk as 32 bits, of the keys that a row of the task sees.
inline void attend_copy(
    const Attention& a, const AttentionTask& task, size_t chunk, Span seen, const Half* keys, const Half* values,
    const Workspace& work, float* states) {
    const size_t first = seen.first_block() * kKeyBlock * a.head_dim, end = seen.end_block() * kKeyBlock * a.head_dim;
    widen(keys + first, end - first, work.keys + first);
    widen(values + first, end - first, work.values + first);
    attend_groups<float>(a, task, chunk, work.keys, work.values, work, states);
}

template <typename Element>
void attend_cache(const Attention& a, const AttentionTask& task, float* scratch, float* states) {
    const size_t num_rows = task.end_row - task.first_row;
    const Workspace work(a, task, scratch);
    prepare_queries(a, task, work.queries);
    const Span all = {work.seen[0].first, work.seen[num_rows - 1].end};
    const size_t base = (task.sequence * a.kv_heads + task.kv_head) * a.capacity;
    for (size_t chunk = task.first_chunk; chunk < task.end_chunk; ++chunk) {
        const Span seen = of_chunk(all, chunk);
        if (seen.is_empty()) continue;
        const size_t start = (base + chunk * kKeyChunk) * a.head_dim;
        const Element *keys = static_cast<const Element*>(a.keys) + start,
                      *values = static_cast<const Element*>(a.values) + start;
        if constexpr (sizeof(Element) == sizeof(Half)) {
            if (num_rows > kNarrowGroups * kQueryGroup) {
                attend_copy(a, task, chunk, seen, keys, values, work, states);
                continue;
            }
        }
        attend_groups(a, task, chunk, keys, values, work, states);
    }
    if (states != nullptr) return;
    for (size_t row = 0; row < num_rows; ++row)
        write_output(a, task.sequence, task.kv_head, task.first_row + row, work.states + row * a.state_size());
}

void attend(const Attention& a, const AttentionTask& task, float* scratch, float* states) {
    (a.is_half ? attend_cache<Half> : attend_cache<float>)(a, task, scratch, states);
}

void merge(const Attention& a, size_t sequence, size_t kv_head, size_t row, float* states) {
    const Span seen = seen_from(a, position_of(a, sequence, row));
    const size_t first = seen.first / kKeyChunk, dim = a.head_dim;
    float* whole = state_of(a, states, sequence, kv_head, row, first);
    for (size_t chunk = first + 1; chunk * kKeyChunk < seen.end; ++chunk) {
        const float* state = state_of(a, states, sequence, kv_head, row, chunk);
        merge_state(whole, state, {state[dim], state[dim + 1]}, dim);
    }
    write_output(a, sequence, kv_head, row, whole);
}

constexpr AttentionKernels kAttention = {store, attend, merge};

}  // namespace
}  // namespace fly
