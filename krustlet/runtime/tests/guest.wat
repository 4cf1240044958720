;; A wasi:http component that does what the first letter of the path says:
;;   /v  answers 200 with its version          /c  counts in a global and answers with the count
;;   /s  spins for ever                        /t  traps
;;   /g  grows its memory by 64 MiB            /e  grows its table by a million entries
;;   /n  returns without an answer             /w  answers after 400 ms
;;   /b  sends half of a body, then traps      /l  writes a line to stderr, then as /v
(component
  (import "wasi:io/poll@0.2.0" (instance $poll
    (export "pollable" (type $pollable (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $pollable))))))
  (alias export $poll "pollable" (type $pollable))
  (import "wasi:clocks/monotonic-clock@0.2.0" (instance $clock
    (alias outer 1 $pollable (type $outer))
    (export "pollable" (type $pollable (eq $outer)))
    (export "subscribe-duration" (func (param "when" u64) (result (own $pollable))))))
  (import "wasi:io/error@0.2.0" (instance $error
    (export "error" (type (sub resource)))))
  (alias export $error "error" (type $error-type))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "output-stream" (type $output-stream (sub resource)))
    (alias outer 1 $error-type (type $outer))
    (export "error" (type $error (eq $outer)))
    (type $stream-error-type (variant (case "last-operation-failed" (own $error)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $stream-error-type)))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $output-stream)) (param "contents" (list u8)) (result (result (error $stream-error)))))))
  (alias export $streams "output-stream" (type $output-stream))
  (import "wasi:cli/stderr@0.2.0" (instance $stderr
    (alias outer 1 $output-stream (type $outer))
    (export "output-stream" (type $output-stream (eq $outer)))
    (export "get-stderr" (func (result (own $output-stream))))))
  (import "wasi:http/types@0.2.0" (instance $types
    (alias outer 1 $output-stream (type $outer))
    (export "output-stream" (type $output-stream (eq $outer)))
    (export "fields" (type $fields (sub resource)))
    (export "incoming-request" (type $incoming-request (sub resource)))
    (export "response-outparam" (type $response-outparam (sub resource)))
    (export "outgoing-response" (type $outgoing-response (sub resource)))
    (export "outgoing-body" (type $outgoing-body (sub resource)))
    (type $dns-type (record (field "rcode" (option string)) (field "info-code" (option u16))))
    (export "DNS-error-payload" (type $dns (eq $dns-type)))
    (type $tls-type (record (field "alert-id" (option u8)) (field "alert-message" (option string))))
    (export "TLS-alert-received-payload" (type $tls (eq $tls-type)))
    (type $field-type (record (field "field-name" (option string)) (field "field-size" (option u32))))
    (export "field-size-payload" (type $field (eq $field-type)))
    (type $error-code-type (variant
      (case "DNS-timeout") (case "DNS-error" $dns) (case "destination-not-found") (case "destination-unavailable")
      (case "destination-IP-prohibited") (case "destination-IP-unroutable") (case "connection-refused")
      (case "connection-terminated") (case "connection-timeout") (case "connection-read-timeout")
      (case "connection-write-timeout") (case "connection-limit-reached") (case "TLS-protocol-error")
      (case "TLS-certificate-error") (case "TLS-alert-received" $tls) (case "HTTP-request-denied")
      (case "HTTP-request-length-required") (case "HTTP-request-body-size" (option u64))
      (case "HTTP-request-method-invalid") (case "HTTP-request-URI-invalid") (case "HTTP-request-URI-too-long")
      (case "HTTP-request-header-section-size" (option u32)) (case "HTTP-request-header-size" (option $field))
      (case "HTTP-request-trailer-section-size" (option u32)) (case "HTTP-request-trailer-size" $field)
      (case "HTTP-response-incomplete") (case "HTTP-response-header-section-size" (option u32))
      (case "HTTP-response-header-size" $field) (case "HTTP-response-body-size" (option u64))
      (case "HTTP-response-trailer-section-size" (option u32)) (case "HTTP-response-trailer-size" $field)
      (case "HTTP-response-transfer-coding" (option string)) (case "HTTP-response-content-coding" (option string))
      (case "HTTP-response-timeout") (case "HTTP-upgrade-failed") (case "HTTP-protocol-error") (case "loop-detected")
      (case "configuration-error") (case "internal-error" (option string))))
    (export "error-code" (type $error-code (eq $error-code-type)))
    (export "[constructor]fields" (func (result (own $fields))))
    (export "[method]incoming-request.path-with-query"
      (func (param "self" (borrow $incoming-request)) (result (option string))))
    (export "[constructor]outgoing-response"
      (func (param "headers" (own $fields)) (result (own $outgoing-response))))
    (export "[method]outgoing-response.body"
      (func (param "self" (borrow $outgoing-response)) (result (result (own $outgoing-body)))))
    (export "[method]outgoing-body.write"
      (func (param "self" (borrow $outgoing-body)) (result (result (own $output-stream)))))
    (export "[static]outgoing-body.finish"
      (func (param "this" (own $outgoing-body)) (param "trailers" (option (own $fields)))
        (result (result (error $error-code)))))
    (export "[static]response-outparam.set"
      (func (param "param" (own $response-outparam))
        (param "response" (result (own $outgoing-response) (error $error-code)))))))
  (alias export $types "incoming-request" (type $incoming-request))
  (alias export $types "response-outparam" (type $response-outparam))

  (core module $libc
    (memory (export "memory") 1)
    (global $free (mut i32) (i32.const 4096))
    (func (export "realloc") (param i32 i32 i32) (param $size i32) (result i32)
      (global.get $free)
      (global.set $free (i32.and (i32.add (i32.add (global.get $free) (local.get $size)) (i32.const 7)) (i32.const -8)))))
  (core instance $libc (instantiate $libc))

  (core func $block (canon lower (func $poll "[method]pollable.block")))
  (core func $subscribe (canon lower (func $clock "subscribe-duration")))
  (core func $get-stderr (canon lower (func $stderr "get-stderr")))
  (core func $fields (canon lower (func $types "[constructor]fields")))
  (core func $response (canon lower (func $types "[constructor]outgoing-response")))
  (core func $path (canon lower (func $types "[method]incoming-request.path-with-query")
    (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
  (core func $body (canon lower (func $types "[method]outgoing-response.body") (memory (core memory $libc "memory"))))
  (core func $write (canon lower (func $types "[method]outgoing-body.write") (memory (core memory $libc "memory"))))
  (core func $finish (canon lower (func $types "[static]outgoing-body.finish")
    (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
  (core func $set (canon lower (func $types "[static]response-outparam.set") (memory (core memory $libc "memory"))))
  (core func $flush (canon lower (func $streams "[method]output-stream.blocking-write-and-flush") (memory (core memory $libc "memory"))))
  (core func $drop-stream (canon resource.drop $output-stream))

  (core module $code
    (import "libc" "memory" (memory 1))
    (import "host" "block" (func $block (param i32)))
    (import "host" "subscribe" (func $subscribe (param i64) (result i32)))
    (import "host" "get-stderr" (func $get-stderr (result i32)))
    (import "host" "fields" (func $fields (result i32)))
    (import "host" "response" (func $response (param i32) (result i32)))
    (import "host" "path" (func $path (param i32 i32)))
    (import "host" "body" (func $body (param i32 i32)))
    (import "host" "write" (func $write (param i32 i32)))
    (import "host" "finish" (func $finish (param i32 i32 i32 i32)))
    (import "host" "set" (func $set (param i32 i32 i32 i32 i64 i32 i32 i32 i32)))
    (import "host" "flush" (func $flush (param i32 i32 i32 i32)))
    (import "host" "drop-stream" (func $drop-stream (param i32)))
    (table $entries 1 funcref)
    (global $count (mut i32) (i32.const 0))
    ;; 0: where results go. 64: the version. 128: the count. 192: the line for stderr.
    (data (i32.const 64) "VERSION")
    (data (i32.const 192) "written by the guest\n")

    (func $sleep (param $milliseconds i64)
      (call $block (call $subscribe (i64.mul (local.get $milliseconds) (i64.const 1000000)))))

    ;; Answers 200 and gives the body.
    (func $begin (param $out i32) (result i32)
      (local $response i32) (local $body i32)
      (local.set $response (call $response (call $fields)))
      (call $body (local.get $response) (i32.const 0))
      (local.set $body (i32.load (i32.const 4)))
      (call $set (local.get $out) (i32.const 0) (local.get $response) (i32.const 0) (i64.const 0)
        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0))
      (local.get $body))

    (func $send (param $body i32) (param $text i32) (param $length i32)
      (local $stream i32)
      (call $write (local.get $body) (i32.const 0))
      (local.set $stream (i32.load (i32.const 4)))
      (call $flush (local.get $stream) (local.get $text) (local.get $length) (i32.const 0))
      (call $drop-stream (local.get $stream)))

    (func $answer (param $out i32) (param $text i32) (param $length i32)
      (local $body i32)
      (local.set $body (call $begin (local.get $out)))
      (call $send (local.get $body) (local.get $text) (local.get $length))
      (call $finish (local.get $body) (i32.const 0) (i32.const 0) (i32.const 0)))

    (func (export "handle") (param $request i32) (param $out i32)
      (local $letter i32) (local $stream i32)
      (global.set $count (i32.add (global.get $count) (i32.const 1)))
      (call $path (local.get $request) (i32.const 0))
      (local.set $letter (i32.load8_u offset=1 (i32.load (i32.const 4))))
      (if (i32.eq (local.get $letter) (i32.const 115)) (then (loop $forever (br $forever))))   ;; s
      (if (i32.eq (local.get $letter) (i32.const 116)) (then (unreachable)))                   ;; t
      (if (i32.eq (local.get $letter) (i32.const 110)) (then (return)))                        ;; n
      (if (i32.eq (local.get $letter) (i32.const 103))                                         ;; g
        (then (if (i32.lt_s (memory.grow (i32.const 1024)) (i32.const 0)) (then (unreachable)))))
      (if (i32.eq (local.get $letter) (i32.const 101))                                         ;; e
        (then (drop (table.grow $entries (ref.null func) (i32.const 90000)))))
      (if (i32.eq (local.get $letter) (i32.const 119)) (then (call $sleep (i64.const 400))))   ;; w
      (if (i32.eq (local.get $letter) (i32.const 108))                                         ;; l
        (then
          (local.set $stream (call $get-stderr))
          (call $flush (local.get $stream) (i32.const 192) (i32.const 21) (i32.const 0))))
      (if (i32.eq (local.get $letter) (i32.const 98))                                          ;; b
        (then
          (call $send (call $begin (local.get $out)) (i32.const 64) (i32.const 7))
          (call $sleep (i64.const 100))
          (unreachable)))
      (if (i32.eq (local.get $letter) (i32.const 99))                                          ;; c
        (then
          (i32.store8 (i32.const 128) (i32.add (i32.const 48) (global.get $count)))
          (call $answer (local.get $out) (i32.const 128) (i32.const 1))
          (return)))
      (call $answer (local.get $out) (i32.const 64) (i32.const 7))))
  (core instance $code (instantiate $code
    (with "libc" (instance $libc))
    (with "host" (instance
      (export "block" (func $block)) (export "subscribe" (func $subscribe)) (export "get-stderr" (func $get-stderr))
      (export "fields" (func $fields)) (export "response" (func $response)) (export "path" (func $path))
      (export "body" (func $body)) (export "write" (func $write)) (export "finish" (func $finish))
      (export "set" (func $set)) (export "flush" (func $flush)) (export "drop-stream" (func $drop-stream))))))
  (func $handle (param "request" (own $incoming-request)) (param "response-out" (own $response-outparam))
    (canon lift (core func $code "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler)))
