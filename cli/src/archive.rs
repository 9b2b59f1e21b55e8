//! Where images come from: a folder, or an archive that a container engine has exported.
//!
//! | archive | what is in it |
//! |---|---|
//! | podman's `container checkpoint --export` | a tar, plain or compressed with gzip or zstd, the images in `checkpoint/` |
//! | CRI-O's, as the kubelet leaves it | the same, plain |
//! | containerd's `ctr images export` of a checkpoint | an OCI layout: a tar of blobs, one of which is a tar of images |

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;
use soccr::criu::image::{ImageDir, inventory};
use tempfile::TempDir;

use crate::progress;

/// The images behind a path that somebody gave to the command.
#[derive(Debug)]
pub struct Images {
    /// The folder that has them.
    pub dir: ImageDir,
    /// Where that folder is: what was given, or a part of it.
    pub path: PathBuf,
    /// The folder that an archive was unpacked into; it goes with this value.
    _unpacked: Option<TempDir>,
}

/// What an image's file takes at most once it is unpacked, in bytes: a connection's two queues are below it.
const LARGEST_IMAGE: u64 = 4 << 30;
/// Files of CRIU that hold memory, and are of no interest here.
const MEMORY: [&str; 2] = ["pages-", "pagemap-"];
/// Where engines keep the images inside of a checkpoint.
const INSIDE: [&str; 2] = ["", "checkpoint"];

impl Images {
    /// Opens the folder at `path`, or unpacks the archive there into a temporary folder.
    pub fn open(path: &Path) -> Result<Self> {
        let open = || if path.is_dir() { Self::of_folder(path) } else { Self::unpack(path) };
        open().with_context(|| path.display().to_string())
    }

    fn of_folder(path: &Path) -> Result<Self> {
        let with_inventory =
            INSIDE.iter().map(|inside| path.join(inside)).find(|dir| dir.join(inventory::NAME).exists());
        // Without an inventory there may be images of ours alone.
        let path = with_inventory.unwrap_or_else(|| path.to_owned());
        Ok(Self { dir: ImageDir::open(&path)?, path, _unpacked: None })
    }

    fn unpack(archive: &Path) -> Result<Self> {
        let unpacked = TempDir::with_prefix("soccr-images-").context("cannot make a temporary folder")?;
        let file = File::open(archive).context("cannot open it")?;
        let bar = progress::bytes("unpacking", file.metadata()?.len());
        let mut unpacker = Unpacker { root: unpacked.path(), folders: Vec::new() };
        unpacker.archive(BufReader::new(bar.wrap_read(file)), true)?;
        bar.finish_and_clear();
        let found = unpacker.folders.iter().map(|number| unpacked.path().join(number.to_string()));
        let [path] = &found.filter(|dir| dir.join(inventory::NAME).exists()).collect::<Vec<_>>()[..] else {
            bail!(
                "this archive does not hold the images of one checkpoint: it has no inventory.img, or several"
            );
        };
        Ok(Self { dir: ImageDir::open(path)?, path: archive.to_owned(), _unpacked: Some(unpacked) })
    }
}

/// Takes the image files out of archives: each folder of an archive becomes a numbered one, so that no name in it
/// leads anywhere else.
struct Unpacker<'a> {
    root: &'a Path,
    folders: Vec<usize>,
}

impl Unpacker<'_> {
    /// `with_blobs`: the archive may be an OCI layout, whose blobs may be archives.
    fn archive(&mut self, packed: impl BufRead, with_blobs: bool) -> Result<()> {
        let mut archive = tar::Archive::new(plain(packed)?);
        let mut folders: Vec<(PathBuf, usize)> = Vec::new();
        for entry in archive.entries().context("it is no tar archive")? {
            let mut entry = entry.context("it is no tar archive, or a broken one")?;
            let path = entry.path().context("it has an impossible name")?.into_owned();
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let parent = path.parent().unwrap_or(Path::new("")).to_owned();
            if let Some(name) = image_name(&path) {
                let number = match folders.iter().find(|(known, _)| *known == parent) {
                    Some((_, number)) => *number,
                    None => self.folder(&mut folders, parent)?,
                };
                self.image(&mut entry, number, name)?;
            } else if with_blobs
                && parent.components().any(|part| part == Component::Normal("blobs".as_ref()))
            {
                let mut blob = BufReader::new(entry);
                if looks_like_archive(blob.fill_buf()?) {
                    self.archive(blob, false)?;
                }
            }
        }
        Ok(())
    }

    fn folder(&mut self, folders: &mut Vec<(PathBuf, usize)>, parent: PathBuf) -> Result<usize> {
        let number = self.folders.len();
        fs::create_dir(self.root.join(number.to_string())).context("cannot make a temporary folder")?;
        self.folders.push(number);
        folders.push((parent, number));
        Ok(number)
    }

    fn image(&self, entry: &mut impl Read, folder: usize, name: &str) -> Result<()> {
        let path = self.root.join(folder.to_string()).join(name);
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        let mut file = file.with_context(|| format!("cannot unpack {name}"))?;
        let written = io::copy(&mut entry.take(LARGEST_IMAGE + 1), &mut file);
        if written.with_context(|| format!("cannot unpack {name}"))? > LARGEST_IMAGE {
            bail!("{name} in it is larger than any image of a connection");
        }
        Ok(())
    }
}

/// The name of a file that is an image of interest.
fn image_name(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    let wanted = name.ends_with(".img") && !MEMORY.iter().any(|memory| name.starts_with(memory));
    wanted.then_some(name)
}

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// The magic of POSIX archives and where it is.
const USTAR: (usize, &[u8]) = (257, b"ustar");

fn looks_like_archive(beginning: &[u8]) -> bool {
    let ustar = beginning.get(USTAR.0..).is_some_and(|rest| rest.starts_with(USTAR.1));
    ustar || beginning.starts_with(GZIP) || beginning.starts_with(ZSTD)
}

/// What is packed, unpacked.
fn plain<'a>(mut packed: impl BufRead + 'a) -> Result<Box<dyn Read + 'a>> {
    let beginning = packed.fill_buf().context("cannot read it")?;
    if beginning.starts_with(GZIP) {
        Ok(Box::new(MultiGzDecoder::new(packed)))
    } else if beginning.starts_with(ZSTD) {
        Ok(Box::new(StreamingDecoder::new(packed).context("it is broken: zstd")?))
    } else {
        Ok(Box::new(packed))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o600);
            // As it stands: a hostile name is not for the builder to refuse.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn opened(archive: &[u8]) -> Result<Images> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(archive).unwrap();
        Images::open(file.path())
    }

    const CHECKPOINT: [(&str, &[u8]); 4] = [
        ("config.dump", b"{}"),
        ("checkpoint/inventory.img", b"inventory"),
        ("checkpoint/pages-1.img", b"memory"),
        ("checkpoint/files.img", b"files"),
    ];

    fn names(images: &Images) -> Vec<&'static str> {
        ["inventory.img", "files.img", "pages-1.img"]
            .into_iter()
            .filter(|name| images.dir.contains(name))
            .collect()
    }

    #[test]
    fn podmans_and_cri_os() {
        let plain = tar_of(&CHECKPOINT);
        let zstd = ruzstd::encoding::compress_to_vec(&plain[..], ruzstd::encoding::CompressionLevel::Fastest);
        for archive in [gzip(&plain), zstd, plain] {
            assert_eq!(names(&opened(&archive).unwrap()), ["inventory.img", "files.img"]);
        }
    }

    #[test]
    fn containerds() {
        let inner = gzip(&tar_of(&[("inventory.img", b"inventory"), ("files.img", b"files")]));
        let outer = [("index.json", &b"{}"[..]), ("blobs/sha256/aa", b"{}"), ("blobs/sha256/bb", &inner)];
        assert_eq!(names(&opened(&tar_of(&outer)).unwrap()), ["inventory.img", "files.img"]);
    }

    #[test]
    fn a_folder_and_one_with_a_checkpoint_in_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("checkpoint")).unwrap();
        fs::write(folder.path().join("checkpoint/inventory.img"), b"x").unwrap();
        for path in [folder.path().to_owned(), folder.path().join("checkpoint")] {
            assert_eq!(names(&Images::open(&path).unwrap()), ["inventory.img"]);
        }
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        let outside = tempfile::tempdir().unwrap();
        let escaping = format!("{}/inventory.img", outside.path().display());
        let archive =
            tar_of(&[(&escaping, b"absolute"), ("../../inventory.img", b"above"), ("../x.img", b"above")]);
        assert!(opened(&archive).is_err(), "two folders have an inventory");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        let one = opened(&tar_of(&[("../../inventory.img", b"above")])).unwrap();
        assert_eq!(names(&one), ["inventory.img"]);
    }

    #[test]
    fn what_is_no_archive_is_named() {
        for bytes in
            [&b""[..], b"hello", &gzip(b"hello"), &[GZIP, b"rest"].concat(), &[ZSTD, b"rest"].concat()]
        {
            let error = format!("{:#}", opened(bytes).unwrap_err());
            assert!(error.contains("archive") || error.contains("broken"), "{error}");
        }
        let error = format!("{:#}", Images::open(Path::new("/nonexistent/x")).unwrap_err());
        assert_eq!(error, "/nonexistent/x: cannot open it: No such file or directory (os error 2)");
    }
}
