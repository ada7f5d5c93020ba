// SPDX-License-Identifier: MIT
// A process that was forked from one with several threads. The threads of an OpenMP runtime are not
// copied, but it goes on as if they were: a parallel region would wait for them forever.
#pragma once

namespace convnn::cpu {

// Whether this process is one. Read before each parallel region, so it is no more than a variable.
bool is_forked_from_threads();

}  // namespace convnn::cpu
