/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define CONFIG_HAS_TCP_REPAIR
#define CONFIG_HAS_TCP_REPAIR_WINDOW
#include "soccr.h"
#include "../names.h"
