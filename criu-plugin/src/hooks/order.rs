//! The order in which CRIU asks its plugins: a list for each hook, in which they stand as its folder was read. The first that
//! answers is the last that is asked: some answer for tasks that are not theirs (CRIU's own for CUDA and amdgpu), and a
//! plugin behind them would never hear of a task. Ours always lets the next one answer, so it can stand before all.

#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::mem::offset_of;

use super::abi::{HOOKS, PluginDesc};

/// CRIU's `struct list_head`.
#[repr(C)]
struct Link {
    prev: *mut Link,
    next: *mut Link,
}

/// `plugin_desc_t`: a plugin in CRIU's lists.
#[repr(C)]
struct Node {
    desc: *const PluginDesc,
    list: Link,
    library: *mut c_void,
    hooks: [Link; HOOKS],
}

/// The node in which we stand before others.
struct First(UnsafeCell<Node>);

// SAFETY: CRIU loads, calls and unloads plugins in one thread.
unsafe impl Sync for First {}

static FIRST: First = First(UnsafeCell::new(Node {
    desc: std::ptr::null(),
    list: Link::NONE,
    library: std::ptr::null_mut(),
    hooks: [const { Link::NONE }; HOOKS],
}));

impl Link {
    const NONE: Self = Self { prev: std::ptr::null_mut(), next: std::ptr::null_mut() };
}

/// Stands before the plugin that is first in the list of `hook` now. `false`: there is none, and CRIU's own node of this
/// plugin will be the first. `lists` is CRIU's `cr_plugin_ctl`: one list head for the plugins, then one for each hook.
///
/// # Errors
/// When what stands there is not what CRIU 4.0 to 4.2 would have put there.
///
/// # Safety
/// `lists` is that table, with a list for `hook`; `desc` is static.
pub unsafe fn stand_first(
    lists: *mut c_void,
    hook: usize,
    desc: *const PluginDesc,
) -> Result<bool, &'static str> {
    let ours = FIRST.0.get();
    // SAFETY: the caller's word; a list that CRIU has initialised is a circle of live nodes.
    unsafe {
        let head = lists.cast::<Link>().add(1 + hook);
        let next = (*head).next;
        if next == head {
            return Ok(false);
        }
        let offset = offset_of!(Node, hooks) + hook * size_of::<Link>();
        let other = next.byte_sub(offset).cast::<Node>();
        if (*next).prev != head || !(*(*other).desc).has(hook) {
            return Err("this CRIU keeps its plugins in another way");
        }
        (*ours).desc = desc;
        let link = &raw mut (*ours).hooks[hook];
        *link = Link { prev: head, next };
        (*next).prev = link;
        (*head).next = link;
    }
    Ok(true)
}

/// Leaves CRIU's lists, before this library is unloaded.
pub fn leave() {
    // SAFETY: as above: where we stand in a list, our neighbours in it are live.
    unsafe {
        for link in &mut (*FIRST.0.get()).hooks {
            if !link.next.is_null() {
                (*link.next).prev = link.prev;
                (*link.prev).next = link.next;
                *link = Link::NONE;
            }
        }
    }
}
