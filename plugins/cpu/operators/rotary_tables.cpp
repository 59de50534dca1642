#include "rotary_tables.h"

namespace fly {
namespace {

constexpr size_t kTaskAngles = 2048;  // that one thread takes before others are worth waking

struct Turn {
    float cos, sin;
};

// Of an angle up to 2^20, within a unit in the last place, in operations that give the same bits everywhere.
Turn turn_of(double angle) {
    // angle - n pi / 2, with pi / 2 in two parts, of which the first times n is exact.
    constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: a sum with it has no fraction
    const double n = (angle * 0.63661977236758134308 + kShift) - kShift;
    const double r = (angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
    const double z = r * r;
    const double sin =
        r * (1 + z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800))))));
    const double cos = 1 +
        z *
            (-1.0 / 2 +
             z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z * (1.0 / 479001600))))));
    const auto quarter = static_cast<int64_t>(n) & 3;
    const bool is_odd = quarter & 1;
    const double first = is_odd ? sin : cos, second = is_odd ? cos : sin;
    return {
        static_cast<float>(quarter == 1 || quarter == 2 ? -first : first),
        static_cast<float>(quarter >= 2 ? -second : second)};
}

}  // namespace

void RotaryTables::compute(const Context& context) const {
    const Tensor write_indices = context.input(0), input_ids = context.input(1), frequencies = context.input(2);
    Shape shape = input_ids.shape;
    require(
        shape.rank == 2 && write_indices.shape.is({static_cast<size_t>(shape[0])}),
        "input_ids is [B, T] and write_indices [B]");
    const size_t length = shape.last(), count = shape.count(), channels = frequencies.count();
    shape.sizes[shape.rank++] = static_cast<int64_t>(channels);
    auto* cos = context.output<float>(0, shape);
    auto* sin = context.output<float>(1, shape);
    const auto fill = [&](size_t token) {
        const auto position =
            static_cast<float>(write_indices.as<int64_t>()[token / length] + static_cast<int64_t>(token % length));
        for (size_t i = 0; i < channels; ++i) {
            const Turn turn = turn_of(position * frequencies.as<float>()[i]);
            cos[token * channels + i] = turn.cos * scaling_;
            sin[token * channels + i] = turn.sin * scaling_;
        }
    };
    if (count * channels <= kTaskAngles)
        for (size_t token = 0; token < count; ++token) fill(token);
    else
        context.parallel(count, fill);
}

}  // namespace fly
