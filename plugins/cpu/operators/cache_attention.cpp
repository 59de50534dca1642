#include "cache_attention.h"

#include <algorithm>
#include <cstring>

namespace fly {
namespace {

constexpr size_t kEnoughTasks = 8;       // below, tasks get fewer rows, which costs a little
constexpr size_t kSplitBelow = 16;       // tasks below which chunks are shared out too
constexpr size_t kSplitTasks = 32;       // about so many then
constexpr size_t kMostStates = 8 << 20;  // floats that a thread keeps of chunks which were shared out
// What one thread does before others are worth waking: numbers of new keys to store, products, states to merge.
constexpr size_t kValuesAtOnce = 16 << 10;
constexpr size_t kProductsAtOnce = 128 << 10;
constexpr size_t kStatesAtOnce = 128;

// Where an output is not bound to its input's memory, the input is copied; without one the input is written to.
void* present(const Context& context, size_t index, const Tensor& past, size_t item_bytes) {
    void* data = context.output<char>(index, past.shape);
    if (data == nullptr) return past.data;
    if (data != past.data) std::memcpy(data, past.data, past.shape.count() * item_bytes);
    return data;
}

// Tokens of a sequence whose keys lie in the same block are one task: threads do not write to the same lines.
void store(const Context& context, const AttentionKernels& kernels, const Attention& a) {
    const size_t num_blocks = a.tokens / kKeyBlock + 2;
    const bool is_little = a.batch * a.tokens * a.kv_heads * a.head_dim <= kValuesAtOnce;
    share(context, a.batch * num_blocks, is_little, 2 * a.head_dim, [&](size_t index, float* scratch) {
        const size_t sequence = index / num_blocks, start = a.write_indices[sequence];
        const size_t block = start / kKeyBlock + index % num_blocks;
        const size_t first = std::max(start, block * kKeyBlock),
                     end = std::min(start + a.tokens, (block + 1) * kKeyBlock);
        if (first < end) kernels.store(a, sequence, first - start, end - start, scratch);
    });
}

bool is_absent_or(const Tensor& tensor, std::initializer_list<size_t> sizes) {
    return !tensor || tensor.shape.is(sizes);
}

// As many of the heads' rows in a task as give `enough` tasks, but not so few that each reads the keys for little.
size_t tile_rows(size_t rows, size_t num_heads, size_t enough) {
    size_t tile = kTaskRows;
    while (tile > 2 * kQueryGroup && num_heads * parts(rows, tile) < enough) tile /= 2;
    return std::min(tile, rows);
}

// The sizes and positions that the kernels rely on.
void check_fit(
    const Attention& a, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& past_key,
    const Tensor& past_value) {
    require(a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0, "num_heads is a multiple of num_kv_heads");
    require(a.head_dim > 0 && a.head_dim % 16 == 0, "the size of a head is a multiple of 16");
    require(
        past_key.shape.is({a.batch, a.kv_heads, a.capacity / kKeyBlock, a.head_dim, kKeyBlock}) &&
            a.capacity % kKeyBlock == 0 && past_value.shape.is({a.batch, a.kv_heads, a.capacity, a.head_dim}),
        "past_key is [B, Hkv, S / 16, D, 16] and past_value [B, Hkv, S, D]");
    const size_t width = key ? a.heads : a.heads + 2 * a.kv_heads;
    require(
        query.shape.is({a.batch, a.tokens, width * a.head_dim}) && key.present == value.present &&
            is_absent_or(key, {a.batch, a.tokens, a.kv_heads * a.head_dim}) &&
            is_absent_or(value, {a.batch, a.tokens, a.kv_heads * a.head_dim}),
        "query is [B, T, (Hq + 2 Hkv) D], or [B, T, Hq D] with key and value [B, T, Hkv D]");
    for (size_t sequence = 0; sequence < a.batch; ++sequence) {
        const int64_t at = a.write_indices[sequence];
        if (at < 0 || static_cast<size_t>(at) + a.tokens > a.capacity)
            throw Failure(
                std::to_string(a.tokens) + " tokens from position " + std::to_string(at) +
                " on, in a cache with room for " + std::to_string(a.capacity));
    }
}

}  // namespace

CacheAttentionBase::CacheAttentionBase(const Attributes& attributes)
    : kernels_(*kernels().attention),
      heads_(attributes.integer("num_heads", 1)),
      kv_heads_(attributes.integer("num_kv_heads", 1)),
      window_(attributes.integer("window", 0)),
      scale_(attributes.number("scale", 1.0F)),
      softcap_(attributes.number("softcap", 0.0F)),
      epsilon_(attributes.number("epsilon", 0.0F)) {}

void CacheAttentionBase::compute(const Context& context, bool is_half) const {
    const Tensor query = context.input(0), key = context.input(1), value = context.input(2),
                 write_indices = context.input(3);
    const Tensor past_key = context.input(4), past_value = context.input(5), cosines = context.input(6),
                 sines = context.input(7);
    const Tensor query_norm = context.input(8), key_norm = context.input(9);
    Attention a = {};
    a.batch = query.shape[0], a.tokens = query.shape[1];
    a.heads = heads_, a.kv_heads = kv_heads_, a.window = window_;
    a.head_dim = past_value.shape[3], a.capacity = past_value.shape[2];
    a.scale = scale_, a.softcap = softcap_, a.epsilon = epsilon_, a.is_half = is_half;
    a.write_indices = write_indices.as<int64_t>();
    require(write_indices.count() == a.batch, "write_indices has one position for each sequence");
    check_fit(a, query, key, value, past_key, past_value);
    a.query = query.as<float>(), a.query_stride = query.shape.last();
    a.key = key ? key.as<float>() : a.query + heads_ * a.head_dim;
    a.value = value ? value.as<float>() : a.key + kv_heads_ * a.head_dim;
    a.key_stride = key ? kv_heads_ * a.head_dim : a.query_stride;
    a.cosines = cosines.as<float>(), a.sines = sines.as<float>();
    a.half_rotated = cosines ? cosines.shape.last() : 0;
    require(
        cosines.present == sines.present && 2 * a.half_rotated <= a.head_dim &&
            is_absent_or(cosines, {a.batch, a.tokens, a.half_rotated}) &&
            is_absent_or(sines, {a.batch, a.tokens, a.half_rotated}),
        "cos and sin are [B, T, R / 2], R at most D");
    require(
        is_absent_or(query_norm, {a.head_dim}) && is_absent_or(key_norm, {a.head_dim}),
        "query_norm and key_norm are [D]");
    a.query_norm = query_norm.as<float>(), a.key_norm = key_norm.as<float>();
    Shape shape = query.shape;
    a.output = context.output<float>(0, shape.with_last(heads_ * a.head_dim));
    const size_t item_bytes = is_half ? sizeof(Half) : sizeof(float);
    a.keys = present(context, 1, past_key, item_bytes);
    a.values = present(context, 2, past_value, item_bytes);
    if (a.batch * a.tokens == 0) return;
    const auto* indices = a.write_indices;
    a.num_chunks = parts(*std::max_element(indices, indices + a.batch) + a.tokens, kKeyChunk);
    store(context, kernels_, a);
    attend(context, a);
}

// All rows of a key-value head and all chunks are one piece of work that may be cut anywhere. Rows are cut first; where
// that gives too few tasks for many threads, chunks are too, and what each found is merged behind. Where that would be
// much to keep, rows are cut once more instead.
void CacheAttentionBase::attend(const Context& context, const Attention& a) const {
    const size_t rows = a.rows(), num_heads = a.batch * a.kv_heads;
    const size_t num_states = num_heads * rows * a.num_chunks * a.state_size();
    const bool may_split = num_states <= kMostStates && a.num_chunks > 1;
    const size_t tile = tile_rows(rows, num_heads, num_states <= kMostStates ? kEnoughTasks : kSplitBelow);
    const size_t num_tiles = parts(rows, tile), num_tasks = num_heads * num_tiles;
    const bool is_split = may_split && num_tasks < kSplitBelow;
    const size_t num_runs = is_split ? std::min(a.num_chunks, parts(kSplitTasks, num_tasks)) : 1;
    const size_t run = parts(a.num_chunks, num_runs);
    float* states = nullptr;
    if (is_split) {
        Scratch& scratch = Scratch::of_thread();
        scratch.reserve({num_states * sizeof(float)});
        states = scratch.take<float>(num_states);
    }
    size_t num_keys = 0;
    for (size_t sequence = 0; sequence < a.batch; ++sequence) num_keys += a.write_indices[sequence] + a.tokens;
    const bool is_little = 2 * num_keys * a.kv_heads * rows * a.head_dim <= kProductsAtOnce;
    share(context, num_tasks * num_runs, is_little, a.scratch_size(tile), [&](size_t index, float* scratch) {
        const size_t head = index / num_runs % num_heads, first_chunk = index % num_runs * run;
        const size_t first_row = (num_tiles - 1 - index / num_runs / num_heads) * tile;  // the longest first
        const AttentionTask task = {head / a.kv_heads, head % a.kv_heads,
                                    first_row,         std::min(first_row + tile, rows),
                                    first_chunk,       std::min(first_chunk + run, a.num_chunks)};
        kernels_.attend(a, task, scratch, states);
    });
    if (!is_split) return;
    share(context, num_heads, num_heads * rows * a.num_chunks <= kStatesAtOnce, 0, [&](size_t head, float*) {
        for (size_t row = 0; row < rows; ++row) kernels_.merge(a, head / a.kv_heads, head % a.kv_heads, row, states);
    });
}

}  // namespace fly
