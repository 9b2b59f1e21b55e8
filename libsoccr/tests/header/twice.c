/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "soccr.h"
#include "soccr.h"
#include "names.h"
