//! Places at which a guest can be interrupted, where wasmtime has none: before each call that may lead to the host.
//!
//! wasmtime looks at the epoch where a function begins and where a loop turns. A function that calls the host a hundred thousand
//! times in a row has neither: it would hold its thread, could not be ended, and nothing would count what the host keeps for it
//! in the meantime. A loop that is empty is such a place too, and changes nothing else.

use wasmparser::{
    BinaryReader, BinaryReaderError, CodeSectionReader, FunctionBody, ImportSectionReader, Operator, TypeRef,
};

/// Part of what compiled code is known by: another number where another text is compiled.
pub const REVISION: u32 = 1;

const HEADER: usize = 8;
/// The byte of the header that says whether it is a component.
const LAYER: usize = 6;
/// `loop` without parameters and results, `end`.
const EMPTY_LOOP: [u8; 3] = [0x03, 0x40, 0x0b];

const CUSTOM: u8 = 0;
const CORE_MODULE: u8 = 1;
const IMPORTS: u8 = 2;
const COMPONENT: u8 = 4;
const CODE: u8 = 10;

/// The same module or component, with these places in it. Fails for what is none.
pub fn add(wasm: &[u8]) -> Result<Vec<u8>, BinaryReaderError> {
    let mut reader = BinaryReader::new(wasm, 0);
    let header = reader.read_bytes(HEADER)?;
    let component = header.get(LAYER).is_some_and(|layer| *layer != 0);
    let mut output = Vec::with_capacity(wasm.len() + wasm.len() / 16);
    output.extend_from_slice(header);
    let mut imported = 0;
    while !reader.eof() {
        let id = reader.read_u8()?;
        let size = reader.read_var_u32()?;
        let content = reader.read_bytes(size as usize)?;
        match (component, id) {
            (true, CORE_MODULE | COMPONENT) => put(&mut output, id, &add(content)?),
            (false, CODE) => put(&mut output, id, &code(content, imported)?),
            // What it says of places in the code would be said of others.
            (false, CUSTOM) if BinaryReader::new(content, 0).read_string()?.starts_with("metadata.code.") => {}
            (false, IMPORTS) => {
                imported = functions(content)?;
                put(&mut output, id, content);
            }
            _ => put(&mut output, id, content),
        }
    }
    Ok(output)
}

/// How many functions are imported: they have the first indices.
fn functions(section: &[u8]) -> Result<u32, BinaryReaderError> {
    let mut count = 0;
    for import in ImportSectionReader::new(BinaryReader::new(section, 0))?.into_imports() {
        count += u32::from(matches!(import?.ty, TypeRef::Func(_) | TypeRef::FuncExact(_)));
    }
    Ok(count)
}

fn code(section: &[u8], imported: u32) -> Result<Vec<u8>, BinaryReaderError> {
    let bodies = CodeSectionReader::new(BinaryReader::new(section, 0))?;
    let mut output = Vec::with_capacity(section.len() + section.len() / 16);
    put_number(&mut output, bodies.count());
    for body in bodies {
        let body = body_with_places(&body?, imported)?;
        put_number(&mut output, body.len() as u32);
        output.extend_from_slice(&body);
    }
    Ok(output)
}

fn body_with_places(body: &FunctionBody<'_>, imported: u32) -> Result<Vec<u8>, BinaryReaderError> {
    let (bytes, start) = (body.as_bytes(), body.range().start);
    let mut output = Vec::with_capacity(bytes.len() + bytes.len() / 8);
    let mut copied = 0;
    for operator in body.get_operators_reader()?.into_iter_with_offsets() {
        let (operator, offset) = operator?;
        let leaves = match operator {
            Operator::Call { function_index } | Operator::ReturnCall { function_index } => function_index < imported,
            Operator::CallIndirect { .. }
            | Operator::ReturnCallIndirect { .. }
            | Operator::CallRef { .. }
            | Operator::ReturnCallRef { .. } => true,
            _ => false,
        };
        if leaves {
            let at = offset - start;
            output.extend_from_slice(bytes.get(copied..at).unwrap_or_default());
            output.extend_from_slice(&EMPTY_LOOP);
            copied = at;
        }
    }
    output.extend_from_slice(bytes.get(copied..).unwrap_or_default());
    Ok(output)
}

fn put(output: &mut Vec<u8>, id: u8, content: &[u8]) {
    output.push(id);
    put_number(output, content.len() as u32);
    output.extend_from_slice(content);
}

/// LEB128.
fn put_number(output: &mut Vec<u8>, mut number: u32) {
    while number >= 0x80 {
        output.push(number as u8 | 0x80);
        number >>= 7;
    }
    output.push(number as u8);
}
