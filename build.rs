//! Generates the Rust code of CRIU's image messages from `proto/`, without `protoc`.

use std::path::Path;

/// `opts.proto` only carries annotations for CRIU's own tools: it is imported, never generated.
const MESSAGES: [&str; 11] = [
    "core",
    "fdinfo",
    "fown",
    "inventory",
    "pstree",
    "sk-inet",
    "sk-opts",
    "sk-packet",
    "sk-unix",
    "soccr",
    "tcp-stream",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=proto/opts.proto");
    let files: Vec<_> =
        MESSAGES.iter().map(|name| Path::new("proto").join(format!("{name}.proto"))).collect();
    for file in &files {
        println!("cargo:rerun-if-changed={}", file.display());
    }
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .inputs(&files)
        .customize(protobuf_codegen::Customize::default().lite_runtime(true))
        .cargo_out_dir("proto")
        .run_from_script();
}
