//! A connection goes through a file, from one process to the next.
//!
//! ```sh
//! save_restore save ADDRESS FILE     # connects, says "hello, ", and puts the connection into the file
//! save_restore restore FILE          # takes it out, says "world", and prints what the peer has answered to both
//! ```
//!
//! The peer is to send back what it gets, and to close when it has got the end. It does not notice.

use std::error::Error;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use soccr::Connection;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["save", address, file] => save(address, file),
        ["restore", file] => restore(file),
        _ => Err("usage: save_restore save ADDRESS FILE | save_restore restore FILE".into()),
    }
}

fn save(address: &str, file: &str) -> Result<(), Box<dyn Error>> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"hello, ")?;
    let (frozen, refused) = soccr::freeze([stream]);
    if let Some(refused) = refused.first() {
        return Err(soccr::chain(&refused.error).into());
    }
    for connection in frozen.connections() {
        println!("{}: {}", connection.four_tuple(), connection.control_block().state);
        fs::write(file, connection.to_bytes())?; // should it fail, dropping `frozen` lets the connection go on
    }
    drop(frozen.release());
    Ok(())
}

fn restore(file: &str) -> Result<(), Box<dyn Error>> {
    let connection = Connection::from_bytes(&fs::read(file)?).map_err(|error| soccr::chain(&error))?;
    let sockets = soccr::thaw(&[connection]).map_err(|error| soccr::chain(&error))?;
    fs::remove_file(file)?; // the connection is here now, and only once
    for socket in sockets {
        let mut stream = TcpStream::from(socket);
        stream.write_all(b"world")?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        println!("{answer}");
    }
    Ok(())
}
