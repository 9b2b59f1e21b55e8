//! Writes include/soccr.h from the crate's source, or with `--check` compares the two.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = crate_dir.join("include/soccr.h");
    let mut header = Vec::new();
    match cbindgen::generate(crate_dir) {
        Ok(bindings) => bindings.write(&mut header),
        Err(error) => {
            eprintln!("cannot generate the header: {error}");
            return ExitCode::FAILURE;
        }
    }
    if std::env::args().any(|arg| arg == "--check") {
        return check(&path, &header);
    }
    if let Err(error) = std::fs::write(&path, &header) {
        eprintln!("cannot write {}: {error}", path.display());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn check(path: &Path, generated: &[u8]) -> ExitCode {
    if std::fs::read(path).is_ok_and(|committed| committed == generated) {
        return ExitCode::SUCCESS;
    }
    eprintln!("{} differs from libsoccr/src: run scripts/header and commit the result", path.display());
    ExitCode::FAILURE
}
