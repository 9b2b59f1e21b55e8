/* A plugin for CRIU that answers for every task, as CRIU's own for CUDA does where there is a GPU. */

static int answer(int pid)
{
	(void)pid;
	return 0;
}

static int init(int stage)
{
	(void)stage;
	return 0;
}

static void leave(int stage, int ret)
{
	(void)stage;
	(void)ret;
}

/* cr_plugin_desc_t, with CHECKPOINT_DEVICES (11) and RESUME_DEVICES_LATE (9). */
struct {
	const char *name;
	int (*init)(int stage);
	void (*exit)(int stage, int ret);
	unsigned int version, max_hooks;
	int (*hooks[12])(int pid);
} CR_PLUGIN_DESC = { "company", init, leave, 2 << 8, 12, { [9] = answer, [11] = answer } };
