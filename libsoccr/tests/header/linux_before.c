/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include <linux/tcp.h>
#include "soccr.h"
#include "names.h"
