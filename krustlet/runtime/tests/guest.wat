;; A wasi:http component that does what the first letter of the path says:
;;   /v  answers 200 with its version          /c  counts in a global and answers with the count
;;   /s  spins for ever                        /t  traps
;;   /g  grows its memory by 64 MiB            /e  grows its table by a million entries
;;   /n  returns without an answer             /w  answers after 400 ms
;;   /b  sends half of a body, then traps      /l  writes a line to stderr, then as /v
;;   /r  reads the request's body, then as /v  /f  writes a body without end
;;   /xNNN  answers with that status           /kN  writes its version N times, 100 ms before each
;;   /aNNNLLL  answers with that status, that content-length and no body
;;   /ANNNLLL  the same, and then writes its version
;;   /oAUTHORITY/…  sends a request there over http and answers with the status of its answer; or with 502 and the number of
;;       wasi:http's error code in two digits
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
    (export "input-stream" (type $input-stream (sub resource)))
    (type $stream-error-type (variant (case "last-operation-failed" (own $error)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $stream-error-type)))
    (export "[method]input-stream.blocking-read"
      (func (param "self" (borrow $input-stream)) (param "len" u64) (result (result (list u8) (error $stream-error)))))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $output-stream)) (param "contents" (list u8)) (result (result (error $stream-error)))))))
  (alias export $streams "output-stream" (type $output-stream))
  (alias export $streams "input-stream" (type $input-stream))
  (import "wasi:cli/stderr@0.2.0" (instance $stderr
    (alias outer 1 $output-stream (type $outer))
    (export "output-stream" (type $output-stream (eq $outer)))
    (export "get-stderr" (func (result (own $output-stream))))))
  (import "wasi:http/types@0.2.0" (instance $types
    (alias outer 1 $output-stream (type $outer))
    (export "output-stream" (type $output-stream (eq $outer)))
    (alias outer 1 $input-stream (type $outer-input))
    (export "input-stream" (type $input-stream (eq $outer-input)))
    (alias outer 1 $pollable (type $outer-pollable))
    (export "pollable" (type $pollable (eq $outer-pollable)))
    (export "fields" (type $fields (sub resource)))
    (export "incoming-body" (type $incoming-body (sub resource)))
    (export "outgoing-request" (type $outgoing-request (sub resource)))
    (export "request-options" (type $request-options (sub resource)))
    (export "incoming-response" (type $incoming-response (sub resource)))
    (export "future-incoming-response" (type $future (sub resource)))
    (type $scheme-type (variant (case "HTTP") (case "HTTPS") (case "other" string)))
    (export "scheme" (type $scheme (eq $scheme-type)))
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
    (type $header-error-type (variant (case "invalid-syntax") (case "forbidden") (case "immutable")))
    (export "header-error" (type $header-error (eq $header-error-type)))
    (export "[constructor]fields" (func (result (own $fields))))
    (export "[method]fields.append"
      (func (param "self" (borrow $fields)) (param "name" string) (param "value" (list u8))
        (result (result (error $header-error)))))
    (export "[method]incoming-request.path-with-query"
      (func (param "self" (borrow $incoming-request)) (result (option string))))
    (export "[method]incoming-request.consume"
      (func (param "self" (borrow $incoming-request)) (result (result (own $incoming-body)))))
    (export "[method]incoming-body.stream"
      (func (param "self" (borrow $incoming-body)) (result (result (own $input-stream)))))
    (export "[constructor]outgoing-request" (func (param "headers" (own $fields)) (result (own $outgoing-request))))
    (export "[method]outgoing-request.set-path-with-query"
      (func (param "self" (borrow $outgoing-request)) (param "path-with-query" (option string)) (result (result))))
    (export "[method]outgoing-request.set-scheme"
      (func (param "self" (borrow $outgoing-request)) (param "scheme" (option $scheme)) (result (result))))
    (export "[method]outgoing-request.set-authority"
      (func (param "self" (borrow $outgoing-request)) (param "authority" (option string)) (result (result))))
    (export "[method]future-incoming-response.subscribe"
      (func (param "self" (borrow $future)) (result (own $pollable))))
    (export "[method]future-incoming-response.get"
      (func (param "self" (borrow $future))
        (result (option (result (result (own $incoming-response) (error $error-code)))))))
    (export "[method]incoming-response.status" (func (param "self" (borrow $incoming-response)) (result u16)))
    (export "[method]outgoing-response.set-status-code"
      (func (param "self" (borrow $outgoing-response)) (param "status-code" u16) (result (result))))
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
  (alias export $types "outgoing-request" (type $outgoing-request))
  (alias export $types "request-options" (type $request-options))
  (alias export $types "future-incoming-response" (type $future))
  (alias export $types "error-code" (type $error-code))
  (import "wasi:http/outgoing-handler@0.2.0" (instance $outgoing
    (alias outer 1 $outgoing-request (type $outer-request))
    (export "outgoing-request" (type $outgoing-request (eq $outer-request)))
    (alias outer 1 $request-options (type $outer-options))
    (export "request-options" (type $request-options (eq $outer-options)))
    (alias outer 1 $future (type $outer-future))
    (export "future-incoming-response" (type $future (eq $outer-future)))
    (alias outer 1 $error-code (type $outer-code))
    (export "error-code" (type $error-code (eq $outer-code)))
    (export "handle" (func (param "request" (own $outgoing-request)) (param "options" (option (own $request-options)))
      (result (result (own $future) (error $error-code)))))))

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
  (core func $append (canon lower (func $types "[method]fields.append") (memory (core memory $libc "memory"))))
  (core func $response (canon lower (func $types "[constructor]outgoing-response")))
  (core func $path (canon lower (func $types "[method]incoming-request.path-with-query")
    (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
  (core func $body (canon lower (func $types "[method]outgoing-response.body") (memory (core memory $libc "memory"))))
  (core func $write (canon lower (func $types "[method]outgoing-body.write") (memory (core memory $libc "memory"))))
  (core func $finish (canon lower (func $types "[static]outgoing-body.finish")
    (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
  (core func $set (canon lower (func $types "[static]response-outparam.set") (memory (core memory $libc "memory"))))
  (core func $flush (canon lower (func $streams "[method]output-stream.blocking-write-and-flush") (memory (core memory $libc "memory"))))
  (core func $consume (canon lower (func $types "[method]incoming-request.consume") (memory (core memory $libc "memory"))))
  (core func $stream (canon lower (func $types "[method]incoming-body.stream") (memory (core memory $libc "memory"))))
  (core func $read (canon lower (func $streams "[method]input-stream.blocking-read")
    (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
  (core func $request (canon lower (func $types "[constructor]outgoing-request")))
  (core func $set-path (canon lower (func $types "[method]outgoing-request.set-path-with-query") (memory (core memory $libc "memory"))))
  (core func $set-scheme (canon lower (func $types "[method]outgoing-request.set-scheme") (memory (core memory $libc "memory"))))
  (core func $set-authority (canon lower (func $types "[method]outgoing-request.set-authority") (memory (core memory $libc "memory"))))
  (core func $send (canon lower (func $outgoing "handle") (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
  (core func $subscribe-response (canon lower (func $types "[method]future-incoming-response.subscribe")))
  (core func $get-response (canon lower (func $types "[method]future-incoming-response.get")
    (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
  (core func $status (canon lower (func $types "[method]incoming-response.status")))
  (core func $set-status (canon lower (func $types "[method]outgoing-response.set-status-code")))
  (core func $drop-stream (canon resource.drop $output-stream))

  (core module $code
    (import "libc" "memory" (memory 1))
    (import "host" "block" (func $block (param i32)))
    (import "host" "subscribe" (func $subscribe (param i64) (result i32)))
    (import "host" "get-stderr" (func $get-stderr (result i32)))
    (import "host" "fields" (func $fields (result i32)))
    (import "host" "append" (func $append (param i32 i32 i32 i32 i32 i32)))
    (import "host" "response" (func $response (param i32) (result i32)))
    (import "host" "path" (func $path (param i32 i32)))
    (import "host" "body" (func $body (param i32 i32)))
    (import "host" "write" (func $write (param i32 i32)))
    (import "host" "finish" (func $finish (param i32 i32 i32 i32)))
    (import "host" "set" (func $set (param i32 i32 i32 i32 i64 i32 i32 i32 i32)))
    (import "host" "flush" (func $flush (param i32 i32 i32 i32)))
    (import "host" "drop-stream" (func $drop-stream (param i32)))
    (import "host" "consume" (func $consume (param i32 i32)))
    (import "host" "stream" (func $stream (param i32 i32)))
    (import "host" "read" (func $read (param i32 i64 i32)))
    (import "host" "request" (func $new-request (param i32) (result i32)))
    (import "host" "set-path" (func $set-path (param i32 i32 i32 i32) (result i32)))
    (import "host" "set-scheme" (func $set-scheme (param i32 i32 i32 i32 i32) (result i32)))
    (import "host" "set-authority" (func $set-authority (param i32 i32 i32 i32) (result i32)))
    (import "host" "send" (func $send-request (param i32 i32 i32 i32)))
    (import "host" "subscribe-response" (func $subscribe-response (param i32) (result i32)))
    (import "host" "get-response" (func $get-response (param i32 i32)))
    (import "host" "status" (func $status (param i32) (result i32)))
    (import "host" "set-status" (func $set-status (param i32 i32) (result i32)))
    (table $entries 1 funcref)
    (global $count (mut i32) (i32.const 0))
    ;; 0: where results go. 64: the version. 128: the count, or an error's number. 192: the line for stderr.
    ;; 256: where results of requests go.
    (global $status-code (mut i32) (i32.const 200))
    (data (i32.const 64) "VERSION")
    ;; Where the path has three digits that are the content-length; 0 for none. 320: the name of that header.
    (global $length (mut i32) (i32.const 0))
    (data (i32.const 192) "written by the guest\n")
    (data (i32.const 320) "content-length")

    (func $sleep (param $milliseconds i64)
      (call $block (call $subscribe (i64.mul (local.get $milliseconds) (i64.const 1000000)))))

    (func $head (result i32)
      (local $fields i32) (local $response i32)
      (local.set $fields (call $fields))
      (if (global.get $length)
        (then (call $append (local.get $fields) (i32.const 320) (i32.const 14) (global.get $length) (i32.const 3) (i32.const 0))))
      (local.set $response (call $response (local.get $fields)))
      (drop (call $set-status (local.get $response) (global.get $status-code)))
      (local.get $response))

    (func $tell (param $out i32) (param $response i32)
      (call $set (local.get $out) (i32.const 0) (local.get $response) (i32.const 0) (i64.const 0)
        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)))

    ;; Begins the answer and gives its body.
    (func $begin (param $out i32) (result i32)
      (local $response i32) (local $body i32)
      (local.set $response (call $head))
      (call $body (local.get $response) (i32.const 0))
      (local.set $body (i32.load (i32.const 4)))
      (call $tell (local.get $out) (local.get $response))
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

    (func $read-body (param $request i32)
      (local $stream i32)
      (call $consume (local.get $request) (i32.const 0))
      (call $stream (i32.load (i32.const 4)) (i32.const 0))
      (local.set $stream (i32.load (i32.const 4)))
      (loop $more
        (call $read (local.get $stream) (i64.const 4096) (i32.const 0))
        (br_if $more (i32.eqz (i32.load8_u (i32.const 0))))))

    (func $write-for-ever (param $body i32)
      (local $stream i32)
      (call $write (local.get $body) (i32.const 0))
      (local.set $stream (i32.load (i32.const 4)))
      (loop $more
        (call $flush (local.get $stream) (i32.const 8192) (i32.const 4096) (i32.const 0))
        (br_if $more (i32.eqz (i32.load8_u (i32.const 0))))))

    ;; The answer's status, or 502 and the error's number at 128.
    (func $fetch (param $target i32) (param $length i32)
      (local $slash i32) (local $request i32) (local $future i32) (local $code i32)
      (local.set $slash (local.get $target))
      (loop $authority
        (local.set $slash (i32.add (local.get $slash) (i32.const 1)))
        (br_if $authority (i32.ne (i32.load8_u (local.get $slash)) (i32.const 47))))
      (local.set $request (call $new-request (call $fields)))
      (drop (call $set-scheme (local.get $request) (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 0)))
      (if (call $set-authority (local.get $request) (i32.const 1) (local.get $target)
            (i32.sub (local.get $slash) (local.get $target)))
        (then (unreachable)))
      (drop (call $set-path (local.get $request) (i32.const 1) (local.get $slash)
        (i32.sub (i32.add (local.get $target) (local.get $length)) (local.get $slash))))
      (block $failed
        (call $send-request (local.get $request) (i32.const 0) (i32.const 0) (i32.const 256))
        (local.set $code (i32.load8_u (i32.const 264)))
        (br_if $failed (i32.load8_u (i32.const 256)))
        (local.set $future (i32.load (i32.const 264)))
        (call $block (call $subscribe-response (local.get $future)))
        (call $get-response (local.get $future) (i32.const 256))
        (local.set $code (i32.load8_u (i32.const 280)))
        (br_if $failed (i32.load8_u (i32.const 272)))
        (global.set $status-code (call $status (i32.load (i32.const 280))))
        (return))
      (global.set $status-code (i32.const 502))
      (i32.store8 (i32.const 128) (i32.add (i32.const 48) (i32.div_u (local.get $code) (i32.const 10))))
      (i32.store8 (i32.const 129) (i32.add (i32.const 48) (i32.rem_u (local.get $code) (i32.const 10)))))

    (func $digit (param $at i32) (result i32)
      (i32.sub (i32.load8_u (i32.add (i32.load (i32.const 4)) (local.get $at))) (i32.const 48)))

    ;; The status code and the length that the path names.
    (func $read-head
      (global.set $status-code (i32.add (call $digit (i32.const 4)) (i32.add
        (i32.mul (call $digit (i32.const 3)) (i32.const 10)) (i32.mul (call $digit (i32.const 2)) (i32.const 100)))))
      (global.set $length (i32.add (i32.load (i32.const 4)) (i32.const 5))))

    (func (export "handle") (param $request i32) (param $out i32)
      (local $letter i32) (local $stream i32) (local $times i32)
      (global.set $count (i32.add (global.get $count) (i32.const 1)))
      (call $path (local.get $request) (i32.const 0))
      (local.set $letter (i32.load8_u offset=1 (i32.load (i32.const 4))))
      (if (i32.eq (local.get $letter) (i32.const 115)) (then (loop $forever (br $forever))))   ;; s
      (if (i32.eq (local.get $letter) (i32.const 116)) (then (unreachable)))                   ;; t
      (if (i32.eq (local.get $letter) (i32.const 110)) (then (return)))                        ;; n
      (if (i32.eq (local.get $letter) (i32.const 103))                                         ;; g
        (then (if (i32.lt_s (memory.grow (i32.const 1024)) (i32.const 0)) (then (unreachable)))))
      (if (i32.eq (local.get $letter) (i32.const 104))                                         ;; h
        (then
          (if (i32.lt_s (memory.grow (i32.const 640)) (i32.const 0)) (then (unreachable)))
          (call $sleep (i64.const 400))))
      (if (i32.eq (local.get $letter) (i32.const 101))                                         ;; e
        (then (drop (table.grow $entries (ref.null func) (i32.const 90000)))))
      (if (i32.eq (local.get $letter) (i32.const 119)) (then (call $sleep (i64.const 400))))   ;; w
      (if (i32.eq (local.get $letter) (i32.const 108))                                         ;; l
        (then
          (local.set $stream (call $get-stderr))
          (call $flush (local.get $stream) (i32.const 192) (i32.const 21) (i32.const 0))))
      (if (i32.eq (local.get $letter) (i32.const 114)) (then (call $read-body (local.get $request)))) ;; r
      (if (i32.eq (local.get $letter) (i32.const 102))                                         ;; f
        (then (call $write-for-ever (call $begin (local.get $out)))))
      (if (i32.eq (local.get $letter) (i32.const 97))                                          ;; a
        (then
          (call $read-head)
          (call $tell (local.get $out) (call $head))
          (return)))
      (if (i32.eq (local.get $letter) (i32.const 65)) (then (call $read-head)))                ;; A
      (if (i32.eq (local.get $letter) (i32.const 107))                                         ;; k
        (then
          (local.set $times (call $digit (i32.const 2)))
          (call $write (local.tee $stream (call $begin (local.get $out))) (i32.const 0))
          (global.set $count (i32.load (i32.const 4)))
          (loop $more
            (call $sleep (i64.const 100))
            (call $flush (global.get $count) (i32.const 64) (i32.const 7) (i32.const 0))
            (local.set $times (i32.sub (local.get $times) (i32.const 1)))
            (br_if $more (i32.and (i32.ne (local.get $times) (i32.const 0)) (i32.eqz (i32.load8_u (i32.const 0))))))
          (call $drop-stream (global.get $count))
          (call $finish (local.get $stream) (i32.const 0) (i32.const 0) (i32.const 0))
          (return)))
      (if (i32.eq (local.get $letter) (i32.const 120))                                         ;; x
        (then (global.set $status-code (i32.add (call $digit (i32.const 4)) (i32.add
          (i32.mul (call $digit (i32.const 3)) (i32.const 10)) (i32.mul (call $digit (i32.const 2)) (i32.const 100)))))))
      (if (i32.eq (local.get $letter) (i32.const 111))                                         ;; o
        (then
          (call $fetch (i32.add (i32.load (i32.const 4)) (i32.const 2)) (i32.sub (i32.load (i32.const 8)) (i32.const 2)))
          (call $answer (local.get $out) (i32.const 128) (i32.const 2))
          (return)))
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
      (export "fields" (func $fields)) (export "append" (func $append)) (export "response" (func $response)) (export "path" (func $path))
      (export "body" (func $body)) (export "write" (func $write)) (export "finish" (func $finish))
      (export "set" (func $set)) (export "flush" (func $flush)) (export "drop-stream" (func $drop-stream))
      (export "consume" (func $consume)) (export "stream" (func $stream)) (export "read" (func $read))
      (export "request" (func $request)) (export "set-path" (func $set-path)) (export "set-scheme" (func $set-scheme))
      (export "set-authority" (func $set-authority)) (export "send" (func $send))
      (export "subscribe-response" (func $subscribe-response)) (export "get-response" (func $get-response))
      (export "status" (func $status)) (export "set-status" (func $set-status))))))
  (func $handle (param "request" (own $incoming-request)) (param "response-out" (own $response-outparam))
    (canon lift (core func $code "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler)))
