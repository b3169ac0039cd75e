// What the CUDA sources call of each other.

#pragma once

#include "gdn.h"

// gdn_prefill without tensor cores: any dtype, head dims and alignment, one block per value tile,
// head and sequence. In gdn.cu.
extern "C" int gdn_cuda_plain_prefill(const struct GdnRule* args, void* stream);

namespace gdn {

// A code of ours beside CUDA's own: nothing was launched. Its text is in gdn_cuda_error_text.
constexpr int kUnsupportedShape = -1;

}  // namespace gdn
