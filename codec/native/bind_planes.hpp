// Planes as Python hands them over, for bind.cpp and bind_raw.cpp.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <utility>
#include <variant>

#include "kernels.hpp"

namespace nb = nanobind;
using namespace kvstore;

// Read-only, since encoders take what they are given; decoders are handed writable memory by arrays.places_to_write.
using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;
using I64Array = nb::ndarray<const i64, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Payload = nb::ndarray<const u8, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// (pages [blocks, page tokens, heads, dim] or [blocks, groups, tokens of one, heads, groups, elements of one], block ids,
// tokens, first token)
using PagedArgument = std::tuple<AnyArray, I64Array, std::size_t, std::size_t>;
// bits [tokens, heads, dim], or the same in pages
using PlaneArgument = std::variant<AnyArray, PagedArgument>;

// An object has at most so many tokens; planes that several objects share may have more.
inline constexpr std::size_t kObjectTokensMax = 0xFFFF;

// `element`: bytes of one. Throws nb::value_error.
inline PlaneView plane_view(const PlaneArgument& argument, std::size_t element, std::size_t tokens_max = kObjectTokensMax) {
    const PagedArgument* const pages = std::get_if<PagedArgument>(&argument);
    const AnyArray& array = pages ? std::get<0>(*pages) : std::get<AnyArray>(argument);
    const std::size_t axes = array.ndim();
    const bool groups = pages && axes == 6;
    if (!(groups || axes == (pages ? 4u : 3u)) || array.itemsize() != element)
        throw nb::value_error("a plane must be [tokens, heads, dim], or [blocks, page tokens, heads, dim], in the dtype given");
    const auto stride = [&](std::size_t axis) {
        return static_cast<std::ptrdiff_t>(array.stride(axis)) * static_cast<std::ptrdiff_t>(array.itemsize());
    };
    PlaneView plane;
    plane.data = static_cast<u8*>(const_cast<void*>(array.data()));
    const std::size_t heads = groups ? 3 : axes - 2;
    plane.heads = array.shape(heads);
    plane.dim = array.shape(axes - 1);
    plane.token_stride = stride(heads - 1);
    plane.head_stride = stride(heads);
    plane.dim_stride = stride(axes - 1);
    if (groups) {
        plane.token_group = array.shape(2);
        plane.dim_group = array.shape(5);
        if (plane.token_group == 0 || plane.dim_group == 0) throw nb::value_error("a group must hold something");
        plane.token_group_stride = stride(1);
        plane.dim_group_stride = stride(4);
        plane.dim *= array.shape(4);
    }
    plane.tokens = array.shape(0);
    if (pages) {
        const auto& [_, block_ids, tokens, first_token] = *pages;
        plane.tokens = tokens;
        plane.first_token = first_token;
        plane.pages = block_ids.data();
        plane.page_tokens = array.shape(1) * (groups ? plane.token_group : 1);
        plane.page_stride = stride(0);
        const bool fits = tokens <= tokens_max && first_token <= block_ids.size() * plane.page_tokens &&
                          tokens <= block_ids.size() * plane.page_tokens - first_token;
        for (std::size_t i = 0; i < block_ids.size(); ++i)
            if (block_ids.data()[i] < 0 || static_cast<std::size_t>(block_ids.data()[i]) >= array.shape(0) || !fits)
                throw nb::value_error("block ids must name pages, enough for the tokens");
        if (!fits) throw nb::value_error("block ids must name pages, enough for the tokens");
    }
    if (plane.tokens == 0 || plane.tokens > tokens_max) throw nb::value_error("a plane has 1 to 65535 tokens");
    return plane;
}

inline const Kernels& kernels_or_throw(int isa) {
    const Kernels* kernels = isa >= 0 && isa <= static_cast<int>(Isa::avx512) ? kernels_for(static_cast<Isa>(isa)) : nullptr;
    if (kernels == nullptr) throw nb::value_error("this CPU, or this build, lacks the instruction set");
    return *kernels;
}

void bind_raw(nb::module_& m);
