//! SPDY/3.1, as far as the server of a port-forward needs it: frames, and headers that are compressed with a dictionary.
//!
//! The draft (`draft-mbelshe-httpbis-spdy-00`) is how kubectl and the API server speak to a kubelet. There is no flow control
//! in their implementation: who does not read holds the others up.

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_HAS_MORE_INPUT;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use std::collections::HashMap;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// The most that a frame may bring. Clients send at most 32 KiB at once.
const MAX_FRAME: usize = 64 * 1024;
/// The most that a stream's headers may be when they are whole; those of a port-forward are a hundred bytes.
const MAX_HEADERS: usize = 4 * 1024;
/// How far back compressed data may refer.
const WINDOW: usize = 32 * 1024;
const VERSION: u16 = 3;
const FIN: u8 = 1;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;

/// What a client sends.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// A stream begins.
    Open {
        stream: u32,
        headers: HashMap<String, String>,
    },
    Data {
        stream: u32,
        data: Vec<u8>,
        last: bool,
    },
    /// The client wants nothing of the stream any more.
    Reset {
        stream: u32,
    },
    Ping(u32),
    /// The client begins no more streams.
    GoAway,
    Other,
}

/// Reads the frames of one connection.
#[derive(Default)]
pub struct Reader {
    headers: Inflater,
}

impl Reader {
    /// The next frame; none when the client has closed the connection between two. Not to be cut off and called again.
    pub async fn read(&mut self, from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
        let mut head = [0; 8];
        if from.read(&mut head[..1]).await? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut head[1..]).await?;
        let [a, b, c, d, flags, l0, l1, l2] = head;
        let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        if length > MAX_FRAME {
            return Err(invalid("a frame is too long"));
        }
        let mut data = vec![0; length];
        from.read_exact(&mut data).await?;
        if a & 0x80 == 0 {
            let (stream, last) = (u32::from_be_bytes([a, b, c, d]), flags & FIN != 0);
            return Ok(Some(Frame::Data { stream, data, last }));
        }
        if u16::from_be_bytes([a & 0x7f, b]) != VERSION {
            return Err(invalid("a frame is of another version"));
        }
        let number =
            || data.first_chunk().map(|bytes| u32::from_be_bytes(*bytes)).ok_or_else(|| invalid("a short frame"));
        let stream = || Ok::<_, io::Error>(number()? & 0x7fff_ffff);
        Ok(Some(match u16::from_be_bytes([c, d]) {
            SYN_STREAM => {
                let block = data.get(10..).ok_or_else(|| invalid("a short frame"))?;
                Frame::Open { stream: stream()?, headers: self.headers.read(block)? }
            }
            RST_STREAM => Frame::Reset { stream: stream()? },
            PING => Frame::Ping(number()?),
            GOAWAY => Frame::GoAway,
            _ => Frame::Other,
        }))
    }
}

/// Makes the frames of one connection.
#[derive(Default)]
pub struct Writer {
    replied: bool,
}

impl Writer {
    /// Accepts a stream, without headers.
    pub fn reply(&mut self, stream: u32) -> Vec<u8> {
        let mut payload = stream.to_be_bytes().to_vec();
        if !std::mem::replace(&mut self.replied, true) {
            // The head of a zlib stream, which goes on from reply to reply.
            payload.extend([0x78, 0x01]);
        }
        // Stored as it is: that there are no headers, and the empty block that ends a flush.
        payload.extend([0x00, 4, 0, 0xfb, 0xff, 0, 0, 0, 0, 0x00, 0, 0, 0xff, 0xff]);
        control(SYN_REPLY, &payload)
    }

    pub fn data(stream: u32, data: &[u8], last: bool) -> Vec<u8> {
        let mut frame = (stream & 0x7fff_ffff).to_be_bytes().to_vec();
        frame.extend(flags_and_length(if last { FIN } else { 0 }, data.len()));
        frame.extend(data);
        frame
    }

    pub fn pong(number: u32) -> Vec<u8> {
        control(PING, &number.to_be_bytes())
    }

    /// Refuses a stream.
    pub fn refuse(stream: u32) -> Vec<u8> {
        const REFUSED_STREAM: u32 = 3;
        control(RST_STREAM, &[stream.to_be_bytes(), REFUSED_STREAM.to_be_bytes()].concat())
    }
}

fn control(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = (0x8000 | VERSION).to_be_bytes().to_vec();
    frame.extend(kind.to_be_bytes());
    frame.extend(flags_and_length(0, payload.len()));
    frame.extend(payload);
    frame
}

fn flags_and_length(flags: u8, length: usize) -> [u8; 4] {
    let [_, a, b, c] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [flags, a, b, c]
}

/// Takes header blocks apart, which are one compressed stream over the whole connection.
struct Inflater {
    state: Box<DecompressorOxide>,
    window: Vec<u8>,
    position: usize,
    begun: bool,
}

impl Default for Inflater {
    fn default() -> Self {
        let mut window = dictionary();
        let position = window.len();
        window.resize(WINDOW, 0);
        Self { state: Box::default(), window, position, begun: false }
    }
}

impl Inflater {
    fn read(&mut self, mut block: &[u8]) -> io::Result<HashMap<String, String>> {
        if !std::mem::replace(&mut self.begun, true) {
            // The head of a zlib stream with a preset dictionary, which is named by its sum.
            let Some(([method, flags, sum @ ..], rest)) = block.split_first_chunk::<6>() else {
                return Err(invalid("headers are cut off"));
            };
            if method & 0x0f != 8 || flags & 0x20 == 0 || *sum != DICTIONARY_SUM {
                return Err(invalid("headers are not compressed with SPDY's dictionary"));
            }
            block = rest;
        }
        let mut text = Vec::new();
        loop {
            let (status, read, written) =
                decompress(&mut self.state, block, &mut self.window, self.position, TINFL_FLAG_HAS_MORE_INPUT);
            text.extend(self.window.get(self.position..self.position + written).unwrap_or_default());
            self.position = (self.position + written) % WINDOW;
            block = block.get(read..).unwrap_or_default();
            if text.len() > MAX_HEADERS {
                return Err(invalid("headers are too long"));
            }
            match status {
                TINFLStatus::HasMoreOutput => {}
                TINFLStatus::NeedsMoreInput if block.is_empty() => break,
                _ => return Err(invalid("headers cannot be decompressed")),
            }
        }
        parse(&text).ok_or_else(|| invalid("headers are cut off"))
    }
}

fn parse(mut text: &[u8]) -> Option<HashMap<String, String>> {
    let count = number(&mut text)?;
    let mut headers = HashMap::new();
    for _ in 0..count {
        let (name, value) = (word(&mut text)?, word(&mut text)?);
        headers.insert(name.to_ascii_lowercase(), value);
    }
    Some(headers)
}

fn word(text: &mut &[u8]) -> Option<String> {
    let length = number(text)?;
    let (word, rest) = text.split_at_checked(length)?;
    *text = rest;
    Some(String::from_utf8_lossy(word).into_owned())
}

fn number(text: &mut &[u8]) -> Option<usize> {
    let (bytes, rest) = text.split_first_chunk()?;
    *text = rest;
    usize::try_from(u32::from_be_bytes(*bytes)).ok()
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

const DICTIONARY_SUM: [u8; 4] = [0xe3, 0xc6, 0xa7, 0xc2];

/// The dictionary of SPDY/3: words with their lengths before them, then pieces.
fn dictionary() -> Vec<u8> {
    let word = |word: &str| [&[0, 0, 0, u8::try_from(word.len()).unwrap_or(0)], word.as_bytes()].concat();
    WORDS.split('|').flat_map(word).chain(PIECES.bytes()).collect()
}

const WORDS: &str = "options|head|post|put|delete|trace|accept|accept-charset|accept-encoding|accept-language|accept-ranges|\
    age|allow|authorization|cache-control|connection|content-base|content-encoding|content-language|\
    content-length|content-location|content-md5|content-range|content-type|date|etag|expect|expires|from|\
    host|if-match|if-modified-since|if-none-match|if-range|if-unmodified-since|last-modified|location|\
    max-forwards|pragma|proxy-authenticate|proxy-authorization|range|referer|retry-after|server|te|trailer|\
    transfer-encoding|upgrade|user-agent|vary|via|warning|www-authenticate|method|get|status|200 OK|version|\
    HTTP/1.1|url|public|set-cookie|keep-alive|origin";
const PIECES: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritat\
    ive Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found5\
    00 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct N\
    ov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,applic\
    ation/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf\
    -8charset=iso-8859-1,utf-,*,enq=0.";

/// What a client sends, for tests.
#[cfg(test)]
pub mod testing {
    use super::*;

    pub fn bytes(hexadecimal: &str) -> Vec<u8> {
        (0..hexadecimal.len()).step_by(2).map(|at| u8::from_str_radix(&hexadecimal[at..at + 2], 16).unwrap()).collect()
    }

    pub fn syn_stream(stream: u32, block: &[u8]) -> Vec<u8> {
        control(SYN_STREAM, &[&stream.to_be_bytes()[..], &[0; 6], block].concat())
    }

    /// A stream with these headers, stored as they are; the first of a connection begins its compressed stream.
    pub fn open(stream: u32, is_first: bool, headers: &[(&str, &str)]) -> Vec<u8> {
        let word = |word: &str| [&u32::try_from(word.len()).unwrap().to_be_bytes()[..], word.as_bytes()].concat();
        let mut text = u32::try_from(headers.len()).unwrap().to_be_bytes().to_vec();
        text.extend(headers.iter().flat_map(|(name, value)| [word(name), word(value)].concat()));
        let length = u16::try_from(text.len()).unwrap();
        let mut block = if is_first { [&[0x78, 0xf9][..], &DICTIONARY_SUM].concat() } else { Vec::new() };
        block.push(0);
        block.extend([length.to_le_bytes(), (!length).to_le_bytes()].concat());
        block.extend(text);
        syn_stream(stream, &block)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{bytes, syn_stream};
    use super::*;

    /// Two blocks of one zlib stream with the dictionary, as the headers of a port-forward's two streams are.
    const FIRST: &str =
        "78f9e3c6a7c202253a703a2b294a4dcc851625aca9a0808614cb45e01c6061606100a4398b20d198094ade8c0600000000ffff";
    const SECOND: &str = "c2aa19540e2512d60b000000ffff";

    async fn all(mut input: &[u8]) -> io::Result<Vec<Frame>> {
        let mut reader = Reader::default();
        let mut frames = Vec::new();
        while let Some(frame) = reader.read(&mut input).await? {
            frames.push(frame);
        }
        Ok(frames)
    }

    #[test]
    fn the_dictionary_is_that_of_the_draft() {
        let (mut a, mut b) = (1_u32, 0_u32);
        for byte in dictionary() {
            a = (a + u32::from(byte)) % 65_521;
            b = (b + a) % 65_521;
        }
        assert_eq!((dictionary().len(), ((b << 16) | a).to_be_bytes()), (1423, DICTIONARY_SUM));
    }

    #[tokio::test]
    async fn headers_of_one_stream_refer_to_those_of_another() {
        let input = [syn_stream(1, &bytes(FIRST)), syn_stream(3, &bytes(SECOND))].concat();
        let headers = |kind: &str| {
            let all = [("streamtype", kind), ("port", "8080"), ("requestid", "0")];
            HashMap::from(all.map(|(name, value)| (name.to_owned(), value.to_owned())))
        };
        let expected =
            [Frame::Open { stream: 1, headers: headers("error") }, Frame::Open { stream: 3, headers: headers("data") }];
        assert_eq!(all(&input).await.unwrap(), expected);
    }

    #[tokio::test]
    async fn frames_are_read_as_they_are_written() {
        let input = [
            Writer::data(5, b"hello", false),
            Writer::data(5, b"", true),
            Writer::pong(0x8000_0001),
            Writer::refuse(7),
            control(GOAWAY, &[0; 8]),
            control(4, &[0; 4]),
        ];
        let expected = [
            Frame::Data { stream: 5, data: b"hello".to_vec(), last: false },
            Frame::Data { stream: 5, data: Vec::new(), last: true },
            Frame::Ping(0x8000_0001),
            Frame::Reset { stream: 7 },
            Frame::GoAway,
            Frame::Other,
        ];
        assert_eq!(all(&input.concat()).await.unwrap(), expected);
    }

    /// 128 KiB of zeros as headers, compressed with the dictionary.
    const BOMB: &str = "78f9e3c6a7c2ecc13101000000c220fba7de630c600000000000000000000000000000000000000000000000000000000000\
        0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000\
        0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001700\
        0000ffff";

    #[tokio::test]
    async fn headers_that_grow_when_they_are_decompressed_are_an_error_before_they_have_grown() {
        let error = all(&syn_stream(1, &bytes(BOMB))).await.unwrap_err();
        assert!(error.to_string().contains("headers are too long"), "{error}");
        // A claim of how many headers there are, or how long one is, is not believed.
        for claim in [[0xff; 8], [0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]] {
            assert!(parse(&claim).is_none());
        }
    }

    #[tokio::test]
    async fn what_is_cut_off_changed_or_too_long_is_an_error_and_never_a_panic() {
        let input = [syn_stream(1, &bytes(FIRST)), syn_stream(3, &bytes(SECOND)), Writer::data(3, b"x", true)].concat();
        for end in 1..input.len() {
            let _ = all(&input[..end]).await;
            for bit in 0..8 {
                let mut changed = input.clone();
                changed[end] ^= 1 << bit;
                let _ = all(&changed).await;
            }
        }
        assert!(all(&input[..input.len() - 1]).await.is_err());
        assert!(all(&[0, 0, 0, 1, 0, 0xff, 0xff, 0xff]).await.unwrap_err().to_string().contains("too long"));
    }
}
