//! Streams that a test writes by hand, and a channel that brings them a few bytes at a time.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use migration_stream::io::{ByteSource, Readiness};
use migration_stream::ram::{RamBlock, RamBlockTable};
use migration_stream::raw::command::Command;
use migration_stream::raw::header;
use migration_stream::raw::ram::{RAM_VERSION, encode_end_of_section, encode_setup_list};
use migration_stream::raw::section::{
    Announcement, Continuation, encode_continuation, encode_eof, encode_footer,
    encode_vm_description,
};
use migration_stream::{IdStr, InstanceId, PAGE_SIZE, SectionHeader, SectionId};
use vm_memory::VolatileSlice;

use crate::common::guest::configuration;

/// A stream in the making.
#[derive(Clone, Debug)]
pub struct Script(pub Vec<u8>);

impl Script {
    /// Header and configuration.
    pub fn begin() -> Self {
        let mut bytes = Vec::new();
        header::encode(&mut bytes);
        configuration("test").encode(&mut bytes);
        Self(bytes)
    }

    pub fn command(mut self, command: &Command) -> Self {
        command.encode(&mut self.0);
        self
    }

    /// The START section of RAM.
    pub fn ram(mut self, blocks: &[(&str, u64)]) -> Self {
        let blocks = blocks
            .iter()
            .map(|(name, pages)| RamBlock::new(*name, pages * PAGE_SIZE).unwrap());
        let blocks = RamBlockTable::new(blocks.collect()).unwrap();
        section_header(Announcement::Start, 1, "ram", 0, RAM_VERSION).encode(&mut self.0);
        encode_setup_list(&blocks, &mut self.0);
        encode_end_of_section(&mut self.0);
        self.footer(1)
    }

    /// The END section of RAM, in which nothing is left to be sent.
    pub fn ram_end(mut self) -> Self {
        encode_continuation(Continuation::End, SectionId(1), &mut self.0);
        encode_end_of_section(&mut self.0);
        self.footer(1)
    }

    /// The head of a FULL section.
    pub fn device(mut self, id: u32, idstr: &str, instance: u32) -> Self {
        section_header(Announcement::Full, id, idstr, instance, 1).encode(&mut self.0);
        self
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn footer(mut self, id: u32) -> Self {
        encode_footer(SectionId(id), &mut self.0);
        self
    }

    /// A whole FULL section.
    pub fn section(self, id: u32, idstr: &str, body: &[u8]) -> Self {
        self.device(id, idstr, 0).bytes(body).footer(id)
    }

    pub fn eof(mut self) -> Self {
        encode_eof(&mut self.0);
        self
    }

    /// EOF, and a description that gives each section's name and length.
    pub fn end(self, sections: &[(&str, usize)]) -> Self {
        let devices: Vec<_> = sections.iter().map(|(name, len)| {
            format!(
                r#"{{"name":"{name}","instance_id":0,"version":1,"fields":[{{"name":"f","size":{len},"type":"buffer"}}]}}"#
            )
        }).collect();
        let text = format!(r#"{{"page_size":4096,"devices":[{}]}}"#, devices.join(","));
        let mut script = self.eof();
        encode_vm_description(u32::try_from(text.len()).unwrap(), &mut script.0);
        script.bytes(text.as_bytes())
    }
}

fn section_header(
    kind: Announcement,
    id: u32,
    idstr: &str,
    instance: u32,
    version: u32,
) -> SectionHeader {
    SectionHeader {
        kind,
        id: SectionId(id),
        idstr: IdStr::new(idstr).unwrap(),
        instance: InstanceId(instance),
        version,
    }
}

/// Bytes that come `piece` at a time, and then the end of the stream.
#[derive(Debug)]
pub struct Pieces {
    bytes: Vec<u8>,
    at: usize,
    piece: usize,
}

impl Pieces {
    pub fn new(script: Script, piece: usize) -> Self {
        Self {
            bytes: script.0,
            at: 0,
            piece,
        }
    }
}

impl ByteSource for Pieces {
    fn read_scatter(&mut self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize> {
        let rest = &self.bytes[self.at..];
        let mut rest = &rest[..rest.len().min(self.piece)];
        let mut read = 0;
        for slice in guest {
            let n = slice.len().min(rest.len());
            slice.copy_from(&rest[..n]);
            rest = &rest[n..];
            read += n;
        }
        let n = buf.len().min(rest.len());
        buf[..n].copy_from_slice(&rest[..n]);
        self.at += read + n;
        Ok(read + n)
    }

    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        self.read_scatter(&[], buf).map(Some)
    }

    fn wait(&mut self, _: Option<BorrowedFd<'_>>, _: Option<Instant>) -> io::Result<Readiness> {
        Ok(Readiness::Channel)
    }

    fn set_read_deadline(&mut self, _: Option<Instant>) {}
}
