// What the loops of attention over a cache work on (attention_loops.h has the loops).
//
// A query's result depends on itself and the keys that it sees, and on nothing else: keys are taken in chunks that
// begin at fixed positions, each chunk's weights and sums are formed by themselves, and chunks are merged in their
// order. So it does not matter which queries are computed together, nor which thread has which chunks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fly {

// A 16-bit float, as it lies in memory.
struct Half {
    uint16_t bits;
};

constexpr size_t kKeyBlock = 16;     // keys that lie transposed together: [channels][16]
constexpr size_t kKeyChunk = 256;    // keys whose weights are formed together: part of the numerics
constexpr size_t kQueryGroup = 6;    // queries that share what is loaded of keys and values
constexpr size_t kTaskRows = 192;    // queries of a task, at most
constexpr size_t kNarrowGroups = 2;  // up to so many groups read 16-bit floats as they are, more a copy of 32 bits
constexpr size_t kSpanSize = 4;      // floats that the first and last key of a row's take up
constexpr size_t kStateExtra = 16;   // behind a query's sums: the largest score, the sum of the weights

// One layer of one step. A "row" is a query head at a token: the query heads that share a key-value head are rows of
// the same product, row = token * group_size + head within the group.
struct Attention {
    const float* query;  // of a token: at token * query_stride
    const float* key;    // of a token: at token * key_stride, of all key-value heads; values alike
    const float* value;
    size_t query_stride;
    size_t key_stride;
    const int64_t* write_indices;  // [batch]
    void* keys;                    // [batch, kv_heads, capacity / 16, head_dim, 16], float or Half
    void* values;                  // [batch, kv_heads, capacity, head_dim]
    const float* cosines;          // [batch, tokens, half_rotated], or null
    const float* sines;
    const float* query_norm;  // [head_dim], or null
    const float* key_norm;
    float* output;  // [batch, tokens, heads * head_dim]
    size_t batch, tokens, heads, kv_heads, head_dim, capacity;
    size_t half_rotated;  // channels of one half of those that are rotated
    size_t num_chunks;    // of the longest sequence
    size_t window;        // keys that a query sees at most; 0: all before it
    float scale, softcap, epsilon;
    bool is_half;

    [[gnu::always_inline]] size_t group_size() const { return heads / kv_heads; }
    [[gnu::always_inline]] size_t rows() const { return tokens * group_size(); }
    [[gnu::always_inline]] size_t state_size() const { return head_dim + kStateExtra; }
    // Floats of scratch for a task of so many rows.
    [[gnu::always_inline]] size_t scratch_size(size_t num_rows) const {
        const size_t of_rows = num_rows * (head_dim + state_size() + kSpanSize);
        return of_rows + kQueryGroup * (head_dim + kKeyChunk) + 2 * kKeyChunk * head_dim;
    }
};

// Rows of one key-value head of a sequence, and chunks of its keys.
struct AttentionTask {
    size_t sequence, kv_head, first_row, end_row, first_chunk, end_chunk;
};

struct AttentionKernels {
    // Norm and rotation of the keys of tokens first to end of a sequence, and these and the values into the cache.
    // Values beyond what 16 bits hold become the largest that they hold. `scratch` [2 * head_dim].
    void (*store)(const Attention& attention, size_t sequence, size_t first, size_t end, float* scratch);

    // Without `states` the task has all chunks, and its rows' outputs are written. With them a state for each of its
    // chunks is, at [sequence, kv_head, row, chunk], and `merge` makes the output of them.
    void (*attend)(const Attention& attention, const AttentionTask& task, float* scratch, float* states);
    void (*merge)(const Attention& attention, size_t sequence, size_t kv_head, size_t row, float* states);
};

const AttentionKernels* avx2_attention();
const AttentionKernels* avx512_attention();

}  // namespace fly
