# SPDX-License-Identifier: MIT
"""Slips of the CPU kernels, and of what divides their work."""

SLIPS = {
    "csrc/cpu/normalize.h": [
        (
            "norm <= kCosineEpsilon * factor ?",
            "norm <= kCosineEpsilon ?",
            "epsilon is not scaled for rows of large float64 numbers",
        ),
        (
            "norm <= kCosineEpsilon * factor ?",
            "norm < 0 ?",
            "rows of norm zero are divided by it",
        ),
        (
            "if (std::fabs(x[i]) > 0x1p500) result.factor",
            "if (x[i] > 0x1p500) result.factor",
            "squares of large negative float64 numbers overflow",
        ),
        (
            "double inverse_norm() const { return factor * inverse; }",
            "double inverse_norm() const { return inverse; }",
            "the norm of gradients is not scaled back",
        ),
        (
            "if (std::isinf(norm)) result.inverse = std::numeric_limits<double>::quiet_NaN();",
            "",
            "infinite rows are normalized to zero",
        ),
    ],
    "csrc/cpu/vector.h": [
        (
            "uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)",
            "uint16_t((bits + 0x8000) >> 16)",
            "bfloat16 rounds ties away from zero",
        ),
        (
            "out.bits = x != x ? 0x7fc0 : uint16_t(",
            "out.bits = uint16_t(",
            "NaN may round to infinity in bfloat16",
        ),
        (
            "rounded = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;",
            "rounded = (magnitude - 0x38000000 + 0x1000) >> 13;",
            "float16 rounds ties away from zero",
        ),
        (
            "if (magnitude >= 0x47800000) {",
            "if (magnitude > 0x47800000) {",
            "65536 in float16 is not infinite",
        ),
        (
            "rounded = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;",
            "rounded = 0;",
            "subnormal float16 numbers are flushed to zero",
        ),
        (
            "magnitude > 0x7f800000 ? 0x7e00 : 0x7c00",
            "magnitude > 0x7f800000 ? 0x7c00 : 0x7c00",
            "NaN becomes infinity in float16",
        ),
        (
            "const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;",
            "const uint32_t special = 0u;",
            "infinity and NaN of float16 become numbers",
        ),
        (
            "| (uint32_t(x.bits & 0x8000) << 16));",
            ");",
            "the sign of float16 is dropped",
        ),
    ],
    "csrc/cpu/modulate.h": [
        (
            "kLowest : scale < 0 ? -double(s[j]) : double(s[j]);",
            "kLowest : double(s[j]);",
            "softmax with a negative scale subtracts the least similarity",
        ),
        (
            "2 * (scale * (0.5 * double(s[j]) - 0.5 * nearest))",
            "scale * double(s[j])",
            "softmax overflows for large similarities",
        ),
        (
            "if (f.rho == Rho::softmax) grad = f.scale * rho[j] * (grad_rho[j] - mean);",
            "if (f.rho == Rho::softmax) grad = rho[j] * (grad_rho[j] - mean);",
            "the gradient through softmax lacks the scale",
        ),
        (
            "rho[i] = is_missing(s) ? 0 : p.rho == Rho::ones ? 1 : s;",
            "rho[i] = p.rho == Rho::ones ? 1 : is_missing(s) ? 0 : s;",
            "missing neighbors count as ones",
        ),
        (
            "static_cast<float*>(p.grad_similarities)[first + j] = float(grad);",
            "static_cast<float*>(p.grad_similarities)[j] = float(grad);",
            "gradients of similarities of later rows are not written",
        ),
    ],
    "csrc/cpu/exponential.h": [
        (
            "return sum * power(half) * power(exponent - half);",
            "return sum * power(exponent);",
            "powers below the least normal number are arbitrary",
        ),
        (
            "const Vector<double> r = x - n * kHigh - n * kLow;",
            "const Vector<double> r = x - n * kHigh;",
            "ln 2 has only its first 33 bits",
        ),
    ],
    "csrc/cpu/wide_rows.h": [
        (
            "if (first < elements) visit(RowEnd{elements - first}, first);",
            "if (first + 1 < elements) visit(RowEnd{elements - first}, first);",
            "a single last channel is left out",
        ),
    ],
    "csrc/cpu/inverse_list.cpp": [
        (
            "while ((int64_t(1) << bits) < n) ++bits;",
            "while ((int64_t(1) << bits) < n - 1) ++bits;",
            "of one row more than a power of two, the last one counts as another slot",
        ),
    ],
    "csrc/cpu/select.cpp": [
        (
            "list_columns(p, candidates, ranges, first + b, rows.data() + b * columns);",
            "list_columns(p, candidates, ranges, b, rows.data() + b * columns);",
            "masks of batch elements that are packed later are those of the first ones",
        ),
        (
            "const KeyRanges::Rows of = ranges.seen(first + b);",
            "const KeyRanges::Rows of = ranges.seen(b);",
            "ranges of batch elements that are packed later are those of the first ones",
        ),
        (
            "const int64_t count = std::min(batches, p.batch - first);",
            "const int64_t count = batches;",
            "more batch elements are selected than there are",
        ),
        (
            "p.key_mask ? p.key_mask + batch * p.m : nullptr;",
            "p.key_mask;",
            "every batch element has the mask of the first",
        ),
        (
            "std::sort(columns, columns + p.r);",
            "",
            "candidates of a batch element are taken as sorted",
        ),
        (
            "std::sort(candidates.begin(), candidates.end());",
            "",
            "candidates of the whole batch are taken as sorted",
        ),
        (
            "return p.key.offset(a) == p.key.offset(b) &&",
            "return p.m > 0 &&",
            "batch elements with other keys are folded into one",
        ),
        (
            "std::memcmp(p.key_mask + a * p.m, p.key_mask + b * p.m, size_t(p.m)) == 0) &&",
            "true) &&",
            "batch elements with other masks are folded into one",
        ),
        (
            "if (shared == 1 || p.batch % shared) return 1;",
            "if (shared == 1) return 1;",
            "groups of batch elements of unequal size are folded",
        ),
        (
            "std::copy_n(p.key_mask + b * shared * p.m, p.m,",
            "std::copy_n(p.key_mask + b * p.m, p.m,",
            "a folded batch has the masks of other elements",
        ),
        (
            "params_.candidates_stride *= shared;",
            "",
            "a folded batch has the candidates of other elements",
        ),
        (
            "const int64_t row_stride = p.n == 1 ? p.query.batch_stride : p.query.row_stride;",
            "const int64_t row_stride = p.query.row_stride;",
            "folded single queries lie elsewhere",
        ),
        (
            "repeated.insert(repeated.end(), numbers, numbers + count);",
            "repeated.insert(repeated.end(), numbers, numbers + count / 2 * 2);",
            "shared restrictions are repeated for an even number of queries",
        ),
    ],
    "csrc/cpu/select.h": [
        (
            "if (self >= part.begin && self < part.end) strip[self - first] = kLowest;",
            "if (self > part.begin && self < part.end) strip[self - first] = kLowest;",
            "a token at the beginning of a part is selected as its own neighbor",
        ),
        (
            "if (p.key_mask && !p.key_mask[batch * p.m + self]) return false;",
            "if (p.key_mask && !p.key_mask[self]) return false;",
            "whether the token itself may be a neighbor follows the mask of the first element",
        ),
        (
            "return range[0] <= self && self < range[1];",
            "return range[0] <= self && self <= range[1];",
            "the token itself is a neighbor one beyond its range",
        ),
        (
            "return p.key_range + batch * p.range_stride + 2 * row;",
            "return p.key_range + 2 * row;",
            "ranges of later batch elements are those of the first",
        ),
        (
            "return p.self_indices[batch * p.self_stride + row];",
            "return p.self_indices[row];",
            "tokens of later batch elements are those of the first",
        ),
        (
            "while (count < p.k) put(-std::numeric_limits<A>::infinity(), 0);",
            "while (count < p.k) put(-std::numeric_limits<A>::max(), 0);",
            "missing places have a finite similarity",
        ),
        (
            "(p.order == Order::similarity || self_of(p, batch, row) < index)",
            "(p.order == Order::similarity)",
            "the token itself comes last in the order of indices",
        ),
        (
            "return min_of(p.k, (p.candidates ? p.r : p.m) + (includes_self(p) ? 1 : 0));",
            "return min_of(p.k, (p.candidates ? p.r : p.m));",
            "there is no place for the token itself beside all candidates",
        ),
        (
            "const int64_t b = task / blocks, block = task % blocks;",
            "const int64_t b = 0, block = task % blocks;",
            "all batch elements are the first",
        ),
    ],
    "csrc/cpu/aggregate.h": [
        (
            "const int64_t last = min_of(min_of(task + at_once, end) * kBlockRows, p.batch * p.n);",
            "const int64_t last = min_of((task + at_once) * kBlockRows, p.batch * p.n);",
            "blocks of rows reach into the range of the next thread",
        ),
        (
            "p.k * p.c * kPanel, depth, p.o, scratch.output, width, slot > 0);",
            "p.k * p.c * kPanel, depth, p.o, scratch.output, width, false);",
            "only the last slots that are gathered together count",
        ),
        (
            "weight + slot * p.c * kPanel,\n",
            "weight,\n",
            "later slots have the weights of the first",
        ),
        (
            "weight + j * p.c + first, v, sum);",
            "weight + j * p.c, v, sum);",
            "later channels have the depthwise weights of the first",
        ),
        (
            "static_cast<const T*>(p.bias) + first, sum);",
            "static_cast<const T*>(p.bias), sum);",
            "later channels have the bias of the first",
        ),
        (
            "const int64_t b = (first + r) / p.n;",
            "const int64_t b = first / p.n;",
            "rows of the next batch element in one block gather from the first",
        ),
        (
            "std::fill_n(to, p.c, A(0));\n        } else {",
            "} else {",
            "missing neighbors keep what was gathered before",
        ),
        (
            "const int64_t first = task / blocks * kPanel, from = task % blocks * kPackedColumns;",
            "const int64_t first = task / blocks * kPanel, from = 0;",
            "weights of more than 256 channels and slots are packed from the first",
        ),
    ],
    "csrc/cpu/aggregate_backward.h": [
        (
            "const int64_t channel = task % slot_tasks(f) / f.k * kWeightChannels;",
            "const int64_t channel = 0;",
            "gradients of the weight beyond 128 channels are not computed",
        ),
        (
            "for (int64_t t = task + 1; t < stop; ++t) sum += parts[2 * t * f.c + c];",
            "sum += parts[2 * (task + 1) * f.c + c];",
            "of a key in more than two tasks, the later sums are dropped",
        ),
        (
            "const int64_t last = min_of(first + part_rows, rows);",
            "const int64_t last = first + part_rows;",
            "the last part of the rows reaches beyond them",
        ),
        (
            "const int64_t filled = missing ? 0 : outputs;",
            "const int64_t filled = outputs;",
            "an infinite gradient of a row with a missing neighbor makes the weight's NaN",
        ),
        (
            "return offsets[key] >= last && !to_the_end;",
            "return offsets[key] >= last;",
            "keys without pairs at the end get no gradient",
        ),
        (
            "std::copy_n(sum, channels, cuts + (from_before ? 0 : f.c) + c);",
            "std::copy_n(sum, channels, cuts + (from_before ? 0 : f.c));",
            "divided sums of later channels overwrite the first",
        ),
    ],
    "csrc/cpu/select_backward.h": [
        (
            "metric == Metric::cosine && in_pairs && inverse != 0;",
            "metric == Metric::cosine && inverse != 0;",
            "rows in no pair have a gradient of NaN if they are infinite",
        ),
        (
            "block.store(grad + first, inverse == 0 ? Vector<double>{} : total, v);",
            "block.store(grad + first, total, v);",
            "rows of norm zero have a gradient",
        ),
        (
            "total = (total - unit(block, first, v) * along) * inverse;",
            "total = total * inverse;",
            "the gradient of the cosine is not projected",
        ),
        (
            "total[v] += 2 * grad * (",
            "total[v] += grad * (",
            "the gradient of the squared distance is half as large",
        ),
    ],
    "csrc/cpu/rank.h": [
        (
            "Bits key = 0;  // NaN: before every number",
            "Bits key = kSign;  // NaN: before every number",
            "NaN is among the numbers",
        ),
        (
            "const A plus_zero = similarity + A(0);",
            "const A plus_zero = similarity;",
            "minus zero is after zero",
        ),
    ],
    "csrc/cpu/parallel.h": [
        (
            "if (failure) std::rethrow_exception(failure);",
            "",
            "an error in a thread is lost",
        ),
        (
            "const double cost = total * (double(share) / double(tasks));",
            "const double cost = total * (double(share + 1) / double(tasks));",
            "the first tasks are left out",
        ),
    ],
    "csrc/cpu/floating_point_mode.h": [
        (
            "if (mode != before_) set_floating_point_mode(mode);",
            "",
            "other threads flush denormals or not, as they please",
        ),
        (
            "if (changed_) set_floating_point_mode(before_);",
            "",
            "the mode of a thread stays as it was in a call",
        ),
    ],
    "csrc/cpu/select_few.h": [
        (
            "if (b != prepared) read_queries(p, work.first_batch + b, scratch);",
            "if (prepared < 0) read_queries(p, work.first_batch + b, scratch);",
            "queries of a later batch element in one task are those of the first",
        ),
        (
            "bounded = bounded && squares[i] >= kLeastSquare && squares[i] <= kLargestSquare;",
            "bounded = bounded && squares[i] <= kLargestSquare;",
            "tiny keys are screened",
        ),
        (
            "bounded = bounded && squares[i] >= kLeastSquare && squares[i] <= kLargestSquare;",
            "bounded = bounded && squares[i] >= kLeastSquare;",
            "huge keys are screened",
        ),
    ],
}
