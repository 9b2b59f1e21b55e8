//! Lets a plugin find functions of its host in `soccr-test`, as it finds them in criu; compiles what the engine is measured by.

fn main() {
    println!("cargo:rustc-link-arg-bin=soccr-test=-rdynamic");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=benches/raw.c");
    cc::Build::new().file("benches/raw.c").warnings_into_errors(true).compile("raw");
}
