//! Names the shared library for the dynamic linker.

/// The version of the binary interface: it grows when a program must be linked anew.
const SONAME: &str = "libsoccr.so.1";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,{SONAME}");
}
