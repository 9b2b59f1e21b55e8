//! Lets a plugin find functions of its host in `soccr-test`, as it finds them in criu.

fn main() {
    println!("cargo:rustc-link-arg-bin=soccr-test=-rdynamic");
    println!("cargo:rerun-if-changed=build.rs");
}
