//! The folder of plugins that CRIU is given: it loads every `.so` in it, and one that it cannot load ends it.

use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{env, io};

use anyhow::{Context, Result, bail, ensure};
use object::{Object, ObjectKind, ObjectSymbol};

use crate::host;

const PLUGIN: &str = "soccr_plugin.so";
/// By which symbol CRIU knows a plugin.
const DESCRIPTION: &str = "CR_PLUGIN_DESC";

/// Where `scripts/install` (or a build, for the command that lies beside it) has put the plugin.
pub fn installed() -> Result<PathBuf> {
    let command = env::current_exe().context("cannot find out where this command is")?;
    let beside = command.parent().unwrap_or(Path::new("/"));
    let places = ["../lib/soccr/plugins", "../plugins"].map(|place| beside.join(place));
    let mut places =
        places.into_iter().chain(["/usr/local", "/usr"].map(|p| Path::new(p).join("lib/soccr/plugins")));
    let found = places.find(|place| has_plugin(place));
    found.with_context(|| {
        format!("there is no {PLUGIN} where this command is installed; name its folder by --plugins DIR")
    })
}

/// Whether our plugin is in the folder.
pub fn has_plugin(folder: &Path) -> bool {
    folder.join(PLUGIN).exists()
}

/// Whether CRIU can load all that is in the folder, and ours is among it.
///
/// # Errors
/// What is wrong, by its file.
pub fn verify(folder: &Path) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("{}", folder.display()))?;
    let mut names: Vec<_> = entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
    names.sort();
    trusted(&fs::metadata(folder)?).with_context(|| format!("{}", folder.display()))?;
    ensure!(has_plugin(folder), "{}: there is no {PLUGIN}", folder.display());
    for name in names.iter().filter(|name| name.as_encoded_bytes().ends_with(b".so")) {
        let path = folder.join(name);
        loadable(&path, name).with_context(|| format!("{}", path.display()))?;
    }
    Ok(())
}

fn loadable(path: &Path, name: &OsStr) -> Result<()> {
    trusted(&fs::metadata(path)?)?;
    let bytes = fs::read(path)?;
    let described = describes(&bytes).context("is no library for this machine")?;
    ensure!(described || name != PLUGIN, "has no {DESCRIPTION}: it is not a plugin of soccr");
    libraries_are_there(path)
}

/// criu runs as root, and so does what it loads.
fn trusted(metadata: &Metadata) -> Result<()> {
    const OTHERS_WRITE: u32 = 0o002;
    ensure!(
        metadata.mode() & OTHERS_WRITE == 0,
        "everybody may write to it, and criu would run what they write"
    );
    Ok(())
}

/// Whether a shared library says what it is to CRIU.
fn describes(library: &[u8]) -> Result<bool> {
    let file = object::File::parse(library)?;
    ensure!(file.kind() == ObjectKind::Dynamic, "not a shared library");
    let this = fs::read("/proc/self/exe")?;
    ensure!(file.architecture() == object::File::parse(&*this)?.architecture(), "{:?}", file.architecture());
    Ok(file.dynamic_symbols().any(|symbol| symbol.name() == Ok(DESCRIPTION) && symbol.is_definition()))
}

/// Whether the dynamic linker finds what the library needs; it runs nothing of it.
fn libraries_are_there(path: &Path) -> Result<()> {
    let Some(ldd) = host::find_system("ldd") else { return Ok(()) };
    let needed = host::ask(&ldd, [path])?;
    match needed.lines().find(|line| line.contains("not found")) {
        Some(missing) => bail!("the dynamic linker says {:?}", missing.trim()),
        None => Ok(()),
    }
}

/// Plugins in CRIU's own folder, which CRIU does not look into once it is given another.
pub fn hidden_by(folder: &Path) -> Vec<PathBuf> {
    let own = [
        "/usr/lib/criu",
        "/usr/local/lib/criu",
        "/usr/lib/x86_64-linux-gnu/criu",
        "/usr/lib/aarch64-linux-gnu/criu",
    ];
    let entries = own.iter().filter(|own| Path::new(own) != folder).flat_map(fs::read_dir);
    let paths = entries.flatten().flatten().map(|entry| entry.path());
    paths.filter(|path| path.extension() == Some(OsStr::new("so"))).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_is_good_with_a_plugin_and_bad_with_anything_else() {
        let dir = tempfile::tempdir().unwrap();
        let error = || format!("{:#}", verify(dir.path()).unwrap_err());
        assert!(error().contains("there is no soccr_plugin.so"), "{}", error());
        let libc = fs::read("/proc/self/maps").map(|maps| String::from_utf8(maps).unwrap()).unwrap();
        let libc = libc.lines().find(|line| line.contains("libc.so")).expect("linked with glibc");
        let libc = libc.split_whitespace().next_back().unwrap();
        fs::copy(libc, dir.path().join(PLUGIN)).unwrap();
        assert!(error().contains("has no CR_PLUGIN_DESC"), "{}", error());
        fs::write(dir.path().join(PLUGIN), "text").unwrap();
        assert!(error().contains("is no library for this machine"), "{}", error());
        fs::set_permissions(dir.path().join(PLUGIN), PermissionsExt::from_mode(0o666)).unwrap();
        assert!(error().contains("everybody may write"), "{}", error());
        fs::remove_dir_all(dir.path()).unwrap();
        assert!(error().contains("No such file"), "{}", error());
        fs::create_dir(dir.path()).unwrap();
    }
}
