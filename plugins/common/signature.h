// What a plugin looks like from outside, as data: its tensors (name, types, shape) and its fields. Everything that
// TensorRT asks about types, formats and shapes is answered from this table, so that all plugins answer alike and a
// plugin class holds no more than its launch.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace fly {

inline constexpr char const* kNamespace = "fly";
inline constexpr char const* kVersion = "2";

struct TensorSpec {
    char const* name;
    std::vector<nvinfer1::DataType> types;  // any of these; an output has exactly one, or none here: the first input's
    char const* shape;                     // a capital letter per dimension; the same letter means the same size,
                                           // that of an input's dimension or of a field
};

enum class FieldKind { kInteger, kIntegers, kReal };

struct Field {
    char const* name;
    FieldKind kind;
    double defaultValue;  // of integers a single one
    double minimum;       // of every value
    double maximum;
    int32_t maxLength{1};  // how many integers there may be; there is always one
    char letter{'\0'};     // of the outputs' dimensions that have the integer as their size
};

// Integers, or one real number.
struct FieldValue {
    std::vector<int32_t> integers;
    float real{0.0F};
};

struct Signature {
    char const* name;
    std::vector<TensorSpec> inputs;
    std::vector<TensorSpec> outputs;
    std::vector<Field> fields;
};

// The sizes of a call, by the letters of the signature.
class Sizes {
public:
    int64_t operator[](char letter) const {
        return mSizes[index(letter)];
    }
    // Takes the sizes of one tensor. Throws when its rank or a size contradicts what is known already.
    void add(TensorSpec const& tensor, nvinfer1::Dims const& dims);
    // Takes the largest size of each letter, for tensors whose bounds may differ.
    void grow(TensorSpec const& tensor, nvinfer1::Dims const& dims);
    void grow(char letter, int64_t size);

private:
    static size_t index(char letter) {
        return static_cast<size_t>(letter - 'A');
    }
    std::array<int64_t, 26> mSizes{};
    std::array<char const*, 26> mFrom{};  // the tensor that a size came from; null while unknown
};

char const* nameOf(nvinfer1::DataType type);
bool isOneOf(nvinfer1::DataType type, std::vector<nvinfer1::DataType> const& types);

// Each throws, with what was got and what was expected, when the tensors do not fit the signature.
void checkCount(std::vector<TensorSpec> const& tensors, int32_t count, char const* kind);
void checkType(TensorSpec const& tensor, nvinfer1::DataType type);
void checkRank(TensorSpec const& tensor, int32_t rank);

// One value per field of the signature, from INT32 or INT64 plugin fields, for real numbers from FLOAT32 or FLOAT64; a
// missing field gets its default. Throws on a field that the signature does not have, another type or length, and a
// value out of range.
std::vector<FieldValue> readFields(Signature const& signature, nvinfer1::PluginFieldCollection const* fields);

}  // namespace fly
