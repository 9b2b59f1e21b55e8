/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Each name that a program finds through soccr.h. */
static int names(void)
{
	struct libsoccr_sk_data data = { TCP_RECV_QUEUE, TCP_SEND_QUEUE, TCP_TIMESTAMP, TCP_REPAIR_WINDOW, SOCCR_MARK,
					 SOCCR_FLAGS_WINDOW, SOCCR_MEM_EXCL, SOCCR_LOG_ERR, SOCCR_LOG_DBG, 0, 0, 0, 0, 0, 0, 0, 0 };
	struct tcp_repair_window window = { data.snd_wl1, data.snd_wnd, data.max_window, data.rcv_wnd, data.rcv_wup };
	struct tcp_repair_opt option = { 0, 0 };
	union libsoccr_addr addr;

	addr.v4.sin_family = AF_INET;
	addr.v6.sin6_family = AF_INET6;
	return (int)(window.rcv_wup + option.opt_val) + addr.sa.sa_family;
}

int main(void)
{
	libsoccr_set_log(0, 0);
	return names() + libsoccr_save(0, 0, 0);
}
