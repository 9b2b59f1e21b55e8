//! Lets a plugin find functions of its host in `soccr-pluginhost`, as it finds them in criu.

fn main() {
    println!("cargo:rustc-link-arg-bin=soccr-pluginhost=-rdynamic");
    println!("cargo:rerun-if-changed=build.rs");
}
