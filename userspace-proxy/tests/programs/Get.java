import java.net.*;
import java.net.http.*;

class Get {
    public static void main(String[] args) throws Exception {
        var url = URI.create("https://api.example/echo");
        var ask = HttpRequest.newBuilder(url).header("Authorization", "Bearer " + args[0]).build();
        System.out.print(HttpClient.newHttpClient().send(ask, HttpResponse.BodyHandlers.ofString()).body());
        var old = (HttpURLConnection) url.toURL().openConnection();
        old.setRequestProperty("Authorization", "Bearer " + args[0]);
        System.out.print(new String(old.getInputStream().readAllBytes()));
    }
}
