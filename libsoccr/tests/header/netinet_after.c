/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "soccr.h"
#include <netinet/tcp.h>
#include "names.h"
