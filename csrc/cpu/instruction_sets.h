// SPDX-License-Identifier: MIT
// Which of the compiled instruction sets the operators use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace convnn::cpu {

// The kernels that the process uses: of the instruction set that use_instruction_set() named, or
// else the one that the environment variable CONVNN_CPU_ISA names, or else the fastest on this
// processor. Of the last two, the choice is made at the first call, in a few milliseconds unless a
// process before has made it. Throws std::runtime_error if the set that the variable names cannot
// run.
const Kernels& kernels();

// Has all threads use the instruction set of this name from their next operator on; null ends that.
// Returns whether it can run here. `before` receives the name that this replaces, or null.
bool use_instruction_set(const char* name, const char** before);

// The instruction sets that run here, preferred first.
const std::vector<std::string>& usable_instruction_sets();

// Whether kernels() has a choice, without making it.
bool can_choose();

// How kernels() chooses unless use_instruction_set() named a set, as lines of a word and its value:
//
//   instruction_set SET
//   source requested | only | measured | remembered | default
//   microseconds T                      if measured: the CPU time that it took
//   file PATH, file! PATH               where it is remembered, or could not be
//   picoseconds SET1 TIME1 SET2 ...     if measured or remembered: the times of all sets
//
// Makes the choice. Throws as kernels() does.
const std::string& describe_choice();

}  // namespace convnn::cpu
